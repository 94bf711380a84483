"""What Quest is measured by: long documents with something to find in them, and whether it is found."""
