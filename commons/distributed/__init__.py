"""The process group, every rank's place, and memory that ranks of one host share."""
