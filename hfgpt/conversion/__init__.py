"""Import and export of weights: the layouts of GPT-2, nanoGPT and the book, each a table of names."""
