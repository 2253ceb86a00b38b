// Every CUDA kernel of the suite, in one translation unit. Each header holds the ops of one family.
#include "composite.cuh"
#include "grids.cuh"
#include "hash_grid.cuh"
#include "march.cuh"
#include "octree.cuh"
#include "sh.cuh"
#include "sparse_grid.cuh"
#include "tiny_mlp.cuh"
