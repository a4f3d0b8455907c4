"""What makes a CUDA device faster: the optimizer's update, compiled."""
