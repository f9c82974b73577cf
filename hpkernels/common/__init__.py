"""What every part of hpkernels may use: argument checks, packed bits, fixed-order sums, process groups."""
