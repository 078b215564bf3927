"""Published files: JSON, tensors and their names, directories that are whole or not there."""
