"""Actions in videos: which class a clip shows, and where, frame by frame."""
