"""The paper's table made by one command: models pretrained, tuned, distilled, evaluated."""
