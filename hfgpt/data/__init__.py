"""Everything from a text source to a batch; knows `datasets` and tokenizers, no model.

sources.py          any Hub id, file, folder or glob -> documents, split for training and validation
blocks.py           documents -> one stream of tokens -> fixed-length blocks
classification.py   text and label rows -> balanced, split, encoded
instructions.py     instruction or chat rows -> ids and which tokens are learned
collators.py        rows -> tensors
report.py           rows read, kept, dropped and why
synthetic.py        the embedded corpus, generated from a seed
"""
