"""The user's model: open and check its folder, its tokenizer, the device, and find which tensors are linears."""
