"""Batches of callers at work: their files are read, lines become jobs, and files are written.

keeper      a thread of rescue: which batch, which step
input_file  bytes of the storage to rows of text, from any place on
lines       a row of text to a request, or what is wrong with it; pure
scan        all rows of a batch, before it begins
feed        rows become jobs, as the queue has room
output_file the ends of jobs to files
told        a line of such a file; pure
"""
