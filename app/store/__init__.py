"""Postgres: the tables, and every SQL statement of Gristmill with a name and a sentence.

Functions take an open `Connection` (one transaction, from `Database.begin`), so a caller may put
several of them into one commit. Stamps are the database's clock at the start of that transaction.
"""
