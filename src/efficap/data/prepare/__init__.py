"""Public data sets, from their servers to something to train on: COCO, Flickr8k, Flickr30k, CC3M, CC12M."""
