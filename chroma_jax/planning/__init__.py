"""What a training step or a streaming step will need on TPU chips that are not here: compiled for them, read from the program."""
