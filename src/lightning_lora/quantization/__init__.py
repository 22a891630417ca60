"""A base in 4 or 8 bits. bitsandbytes is imported only when there is something to quantize or recognise."""
