"""The dataset: a folder of pictures and captions, checked, cropped to buckets, as arrays. Only numpy and Pillow."""
