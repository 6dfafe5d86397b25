"""Everything from a data source to a batch; knows `datasets` and tokenizers, no model.

rows.py             any Hub id, file, URL, folder or glob -> rows, split by split; files.py reads the files
splits.py           which texts validate and test
sources.py          rows of text -> documents, split for training and validation; cache.py keeps them for the next run
streams.py          documents -> one stream of tokens
blocks.py           one stream of tokens -> fixed-length blocks
classification.py   rows of text and label -> balanced, split, encoded
instructions.py     rows of instructions or chats -> ids and which are learned; templates.py has the chat templates
collators.py        rows -> tensors
report.py           rows read, kept, dropped and why
"""
