"""Webdataset shards: written, indexed, read and decoded."""
