"""The paper's table made by one command: models pretrained, fine-tuned, distilled, evaluated."""
