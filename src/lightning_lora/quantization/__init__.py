"""A base in 4, 8 or 16 bits. bitsandbytes is imported only when there is something to quantize or recognise."""
