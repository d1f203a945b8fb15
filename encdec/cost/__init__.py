"""What models cost: parameters, FLOPs and bytes, peers of equal cost, and chips' peak rates."""
