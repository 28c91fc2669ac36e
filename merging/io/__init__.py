"""Bytes, local or at any fsspec address: files whole and in ranges, copies of remote ones, what is known of them."""
