"""The stages that `demo/train.py` runs, one a file; each reads the files of the stages before it and writes its own."""
