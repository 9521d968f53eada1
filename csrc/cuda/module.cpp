// The extension module. Importing it runs the registrations of the other files in this folder.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {}
