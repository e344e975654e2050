"""What the layers do with the frames of a video: measured, and drawn."""
