// Importing the module runs the registrations beside the launchers; it holds nothing else.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {}
