// Every CUDA kernel of the suite, in one translation unit. Each header holds the ops of one family.
#include "sh.cuh"
