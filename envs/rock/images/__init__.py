"""Images: built from Dockerfiles, and kept on this machine under names."""
