"""What was given: a folder opened and checked, its tokenizer, the device, and which of its tensors are linears."""
