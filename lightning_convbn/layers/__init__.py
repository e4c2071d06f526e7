"""What a module does in each mode: the forward of a pair, marks, frozen BatchNorms, the table of supported layers."""
