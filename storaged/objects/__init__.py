"""Objects: streams of bytes, sealed block by block, coded stripe by stripe, spread over disks, named by a register."""
