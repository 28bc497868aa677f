"""The Efficient U-Net with neighbour attention."""
