"""What files of a checkpoint may say: headers, configurations, quantisation, buffers."""
