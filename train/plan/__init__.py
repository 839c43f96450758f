"""What something will cost, before it is spent."""
