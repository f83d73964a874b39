"""What an acceptor stores on its disk: LMDB behind a redo log."""
