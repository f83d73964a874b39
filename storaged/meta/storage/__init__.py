"""What an acceptor stores on its disk: LMDB with a redo log."""
