"""How much each part of a network matters: scores of layers that decide where bits are spent."""
