// fastgan._cpu: the kernels for Python. Tensors are addresses of float32 memory; their owner sees
// to it that they are as large as the shapes say.
#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "pool.h"

namespace py = pybind11;
using namespace fastgan;

namespace {

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

float* at(Address address) { return reinterpret_cast<float*>(address); }

const Kernels* kernels = &best_kernels();

// Never destroyed: tensors may outlive every static object. Tensors come back in the same sizes at
// each step; scratch takes whatever is large enough, and so settles on one block.
Pool& tensors() {
  static Pool* const pool = new Pool(0.125);
  return *pool;
}
Pool& scratches() {
  static Pool* const pool = new Pool(1e9);
  return *pool;
}

// A block of a pool; it goes back when its last user lets go of it.
class Block {
 public:
  Block(Pool& pool, size_t bytes)
      : pool_(pool), bytes_(bytes), data_(pool.acquire(bytes, &capacity_)) {}
  ~Block() { pool_.release(data_, capacity_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  size_t bytes() const { return bytes_; }
  void* data() const { return data_; }

 private:
  Pool& pool_;
  size_t bytes_, capacity_ = 0;
  void* data_;
};

struct Scratch : Block {
  explicit Scratch(size_t floats) : Block(scratches(), floats * sizeof(float)) {}
  float* floats() const { return static_cast<float*>(data()); }
};

ConvEpilogue epilogue(Address bias, int activation, float negative_slope, Address stats,
                      int groups) {
  return {at(bias), Activation(activation), negative_slope, at(stats), groups};
}

// fprop and dgrad take the same: from one side, by the weight, to the other.
template <typename Winograd, typename Thin>
auto conv_forward(Winograd winograd, Thin thin) {
  return [=](int tile, ConvShape s, Address in, const ConvWeight& weight, Address out,
             const ConvEpilogue& e, int threads) {
    Scratch scratch(tile ? kernels->winograd_scratch(tile, s, e.groups, threads)
                         : kernels->thin_scratch(s, threads));
    if (tile)
      (kernels->*winograd)(tile, s, at(in), weight, at(out), e, scratch.floats(), threads);
    else
      (kernels->*thin)(s, at(in), weight, at(out), e, scratch.floats(), threads);
  };
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels for the CPU: float32, NHWC; see csrc/cpu/kernels.h.";

  py::class_<Block>(m, "Block", py::buffer_protocol())
      .def(py::init([](size_t bytes) { return new Block(tensors(), bytes); }), py::arg("bytes"))
      .def_buffer([](Block& b) {
        return py::buffer_info(b.data(), 1, py::format_descriptor<uint8_t>::format(),
                               ssize_t(b.bytes()));
      });
  m.def("trim", [] {
    tensors().trim();
    scratches().trim();
  });
  m.def("held_bytes", [] { return tensors().held_bytes() + scratches().held_bytes(); });

  m.def("isa", [] { return kernels->isa; });
  m.def("isas", [] {
    py::list names;
    for (const char* name : kIsas)
      if (find_kernels(name)) names.append(name);
    return names;
  });
  m.def("use_isa", [](const std::string& name) {
    const Kernels* found = find_kernels(name.c_str());
    if (!found) throw std::invalid_argument(name);
    kernels = found;
  });

  py::class_<ConvShape>(m, "ConvShape")
      .def(py::init([](int n, int h, int w, int cl, int ch) {
             return ConvShape{n, h, w, cl, ch};
           }),
           py::arg("n"), py::arg("h"), py::arg("w"), py::arg("cl"), py::arg("ch"));
  py::class_<ConvWeight>(m, "ConvWeight")
      .def(py::init([](Address data, ptrdiff_t cl, ptrdiff_t ch, ptrdiff_t kh, ptrdiff_t kw) {
        return ConvWeight{at(data), cl, ch, kh, kw};
      }));
  py::class_<ConvEpilogue>(m, "ConvEpilogue")
      .def(py::init(&epilogue), py::arg("bias"), py::arg("activation"), py::arg("negative_slope"),
           py::arg("stats"), py::arg("groups"));
  py::class_<BatchNormShape>(m, "BatchNormShape")
      .def(py::init([](int groups, int64_t rows, int channels) {
             return BatchNormShape{groups, rows, channels};
           }),
           py::arg("groups"), py::arg("rows"), py::arg("channels"));

  m.def("conv_fprop_stats_tiles", &conv_fprop_stats_tiles);
  m.def("conv_dgrad_stats_tiles", &conv_dgrad_stats_tiles);
  m.def("conv_images_per_stats_tile", &conv_images_per_stats_tile);

  // Tiles of side m (2, 3, 4) by Winograd; m = 0 is the direct kernel for up to 4 high channels.
  m.def("conv_fprop", conv_forward(&Kernels::winograd_fprop, &Kernels::thin_fprop), Release());
  m.def("conv_dgrad", conv_forward(&Kernels::winograd_dgrad, &Kernels::thin_dgrad), Release());
  m.def(
      "conv_wgrad",
      [](int tile, ConvShape s, Address low, Address high, Address dweight, int threads) {
        Scratch scratch(tile ? kernels->winograd_scratch(tile, s, 1, threads)
                             : kernels->thin_scratch(s, threads));
        if (tile)
          kernels->winograd_wgrad(tile, s, at(low), at(high), at(dweight), scratch.floats(),
                                  threads);
        else
          kernels->thin_wgrad(s, at(low), at(high), at(dweight), scratch.floats(), threads);
      },
      Release());

  m.def(
      "bn_stats",
      [](BatchNormShape s, int64_t tile_rows, int tile_stride, Address x, Address stats,
         int threads) { kernels->bn_stats(s, tile_rows, tile_stride, at(x), at(stats), threads); },
      Release());
  m.def("bn_tile_rows", &bn_tile_rows);
  m.def("bn_tiles", &bn_tiles);
  m.def(
      "bn_merge",
      [](int groups, int tiles, int channels, Address stats, Address mean, Address var) {
        kernels->bn_merge(groups, tiles, channels, at(stats), at(mean), at(var));
      },
      Release());
  m.def(
      "bn_apply",
      [](BatchNormShape s, Address x, Address mean, Address invstd, Address weight, Address bias,
         int activation, float slope, Address y, int threads) {
        kernels->bn_apply(s, at(x), at(mean), at(invstd), at(weight), at(bias),
                          Activation(activation), slope, at(y), threads);
      },
      Release());
  m.def(
      "bn_backward",
      [](BatchNormShape s, Address dy, Address x, Address mean, Address invstd, Address weight,
         Address bias, int activation, float slope, bool training, Address dx, Address dweight,
         Address dbias, int threads) {
        Scratch partial(size_t(2) * s.groups * (bn_tiles(s) + 1) * s.channels);
        kernels->bn_backward(s, at(dy), at(x), at(mean), at(invstd), at(weight), at(bias),
                             Activation(activation), slope, training, partial.floats(), at(dx),
                             at(dweight), at(dbias), threads);
      },
      Release());
  m.def(
      "act_backward",
      [](int64_t count, Address dy, Address y, int activation, float slope, Address dx,
         int threads) {
        kernels->act_backward(count, at(dy), at(y), Activation(activation), slope, at(dx),
                              threads);
      },
      Release());
  m.def(
      "gan_loss_forward",
      [](int groups, int64_t count, Address logits, Address targets, int kind, Address loss,
         Address d, Address dlogits) {
        kernels->gan_loss_forward(groups, count, at(logits), at(targets), GanLoss(kind), at(loss),
                                  at(d), at(dlogits));
      },
      Release());
}
