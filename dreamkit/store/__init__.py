"""What dreamkit keeps on disk: dreams, run directories and student artifacts."""
