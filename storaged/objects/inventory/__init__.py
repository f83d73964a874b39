"""What the inventories of a bucket need from the object plane: pages of its versions (``listing``), and rows that say
how far each inventory is (``rows``). ``s3.inventory`` makes the lists.
"""
