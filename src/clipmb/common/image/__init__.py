"""Images to pixel values: reading, resizing, cropping, and the image processor."""
