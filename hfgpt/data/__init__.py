"""Everything from a data source to a batch; depends on `datasets` and tokenizers, not on models.

rows.py             any Hub id, file, URL, folder or glob -> rows, split by split; files.py reads the files
splits.py           which texts go to validation and test
sources.py          rows of text -> documents, split for training and validation; cache.py caches them for the next run
encoding.py         texts -> token ids
streams.py          documents -> one stream of tokens
blocks.py           one stream of tokens -> fixed-length blocks
parts.py            a source of any size -> parts
writing.py          parts -> prepared data, in several processes (processes.py); prepared.py is its format
duplicates.py       repeated texts in a source of any size
token_files.py      datatrove's token files
classification.py   rows of text and label -> balanced, split, encoded
instructions.py     rows of instructions or chats -> token ids and targets; templates.py has the chat templates
collators.py        rows -> tensors
report.py           rows read, kept and dropped, with reasons
"""
