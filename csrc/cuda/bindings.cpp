// fastgan._cuda: the kernels for Python, as descriptions of device memory that are checked, and a
// stream. Nothing is allocated and nothing waited for: a call returns when its kernels are queued.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "arrays.h"
#include "kernels.h"

namespace py = pybind11;
using namespace fastgan;

namespace {

void check_thin(const Call& call, const ConvShape& s) {
  const bool thin = s.ch <= kMostThinChannels && s.kernel_h == 4 && s.kernel_w == 4 &&
                    s.stride == 2 && s.padding == 1 && s.high_h == 2 * s.h && s.high_w == 2 * s.w;
  call.require(thin, "a thin high side is twice as high and wide as the low side, has at most " +
                         std::to_string(kMostThinChannels) +
                         " channels and a kernel of 4x4 with stride 2 and padding 1: not " +
                         std::to_string(s.ch) + " channels, " + std::to_string(s.kernel_h) + "x" +
                         std::to_string(s.kernel_w) + ", " + std::to_string(s.stride) + ", " +
                         std::to_string(s.padding) + " from " + std::to_string(s.h) + "x" +
                         std::to_string(s.w) + " to " + std::to_string(s.high_h) + "x" +
                         std::to_string(s.high_w));
}

void check_dots(const Call& call, const ConvShape& s) {
  const bool dots = s.cl <= kMostDots && s.h == 1 && s.w == 1 && s.padding == 0 &&
                    s.kernel_h == s.high_h && s.kernel_w == s.high_w;
  call.require(dots, "dot products make a low side of 1x1 with at most " +
                         std::to_string(kMostDots) +
                         " channels, without padding by a kernel of the high side's size: not " +
                         std::to_string(s.h) + "x" + std::to_string(s.w) + " with " +
                         std::to_string(s.cl) + " channels");
}

void check_product(const Call& call, const ConvShape& s) {
  call.require(s.kernel_h <= kMostTaps && s.kernel_w <= kMostTaps,
               "kernel " + std::to_string(s.kernel_h) + "x" + std::to_string(s.kernel_w) +
                   ": products take sides to " + std::to_string(kMostTaps));
}

// How a product on tensor cores is made.
struct Product {
  MmaSides sides;
  bool tf32;
};

// The kernels of fprop and dgrad, and what they need.
struct Forward {
  const char* name;
  bool transposed;
  void (*check)(const Call&, const ConvShape&);
  int (*stats_tiles)(ConvShape, int);
  void (*run)(Queue, ConvShape, Dtype, Product, const void*, const void*, ConvEpilogue, void*);
};

template <auto kRun>
void product(Queue queue, ConvShape s, Dtype dtype, Product how, const void* x, const void* weight,
             ConvEpilogue end, void* y) {
  kRun(queue, s, dtype, how.sides, how.tf32, x, weight, end, y);
}

template <auto kRun>
void direct(Queue queue, ConvShape s, Dtype dtype, Product, const void* x, const void* weight,
            ConvEpilogue end, void* y) {
  kRun(queue, s, dtype, x, weight, end, y);
}

int no_tiles(ConvShape, int) { return 0; }

constexpr Forward kForward[] = {
    {"conv_fprop", false, check_product, conv_fprop_stats_tiles, product<conv_fprop>},
    {"conv_dgrad", true, check_product, conv_dgrad_stats_tiles, product<conv_dgrad>},
    {"thin_dgrad", true, check_thin, thin_dgrad_stats_tiles, direct<thin_dgrad>},
    {"dot_fprop", false, check_dots, no_tiles, direct<dot_fprop>},
};

struct Sides {
  ConvShape shape;
  void *low, *high, *weight;
};

Sides sides(Call& call, int stride, int padding, const Array& low, const Array& high,
            const Array& weight) {
  Sides s{};
  s.low = call.images("low", low);
  s.high = call.images("high", high);
  call.require(weight.shape.size() == 4, "weight " + text(weight.shape) + " is not [Cl, Ch, H, W]");
  s.shape = {int(low.shape[0]),    int(low.shape[2]),  int(low.shape[3]),    int(low.shape[1]),
             int(high.shape[1]),   int(high.shape[2]), int(high.shape[3]),   int(weight.shape[2]),
             int(weight.shape[3]), stride,             padding};
  const ConvShape& p = s.shape;
  const std::string both = "low " + text(low.shape) + " and high " + text(high.shape);
  call.require(high.shape[0] == p.n, both + " are of different batches");
  call.require(stride >= 1 && padding >= 0, "stride " + std::to_string(stride) + ", padding " +
                                                std::to_string(padding) +
                                                ": at least 1, and at least 0");
  s.weight = call.images("weight", weight, {p.cl, p.ch, p.kernel_h, p.kernel_w});
  const auto fits = [&](int side, int high_side, int kernel) {
    const int windows = high_side + 2 * padding - kernel;
    return windows >= 0 && windows / stride + 1 == side;
  };
  call.require(fits(p.h, p.high_h, p.kernel_h) && fits(p.w, p.high_w, p.kernel_w),
               both + " are not the sides of a convolution by a weight " + text(weight.shape) +
                   " with stride " + std::to_string(stride) + " and padding " +
                   std::to_string(padding));
  return s;
}

void check_groups(const Call& call, int groups, int64_t n) {
  call.require(groups >= 1 && n % groups == 0,
               "groups " + std::to_string(groups) + " should divide the batch of " +
                   std::to_string(n));
}

// Rows and columns of a tile, and whether float32 is multiplied in one pass; None for the kernels
// that have no such choice.
using Choice = std::optional<std::tuple<int, int, bool>>;

Product product_of(const Call& call, const Choice& choice, bool needed) {
  call.require(choice.has_value() == needed,
               needed ? "product None should be (rows, columns, tf32)"
                      : "product should be None: there is one way");
  if (!choice) return {};
  const auto [rows, columns, tf32] = *choice;
  call.require((rows == 128 && (columns == 128 || columns == 64)) || (rows == 64 && columns == 64),
               "product " + std::to_string(rows) + "x" + std::to_string(columns) +
                   ": there are 128x128, 128x64 and 64x64");
  return {{rows, columns}, tf32};
}

auto conv_forward(const Forward& c) {
  return [c](int stride, int padding, const Choice& choice, int groups, const Array& x,
             const Array& weight, const Array* bias, int activation, float negative_slope,
             const Array& y, const Array* stats, uintptr_t stream) {
    Call call(c.name);
    const Product product = product_of(call, choice, c.check == check_product);
    const Sides s = c.transposed ? sides(call, stride, padding, x, y, weight)
                                 : sides(call, stride, padding, y, x, weight);
    c.check(call, s.shape);
    check_groups(call, groups, s.shape.n);
    const int channels = c.transposed ? s.shape.ch : s.shape.cl;
    ConvEpilogue end{call.per_channel("bias", bias, channels), call.act(activation, negative_slope),
                     nullptr, groups};
    const int tiles = c.stats_tiles(s.shape, groups);
    call.require(!stats || tiles, "stats should be None: dot products have none");
    if (stats) end.stats = call.floats("stats", *stats, {tiles, 3, channels});
    c.run(call.on(stream), s.shape, call.dtype(), product, c.transposed ? s.low : s.high, s.weight,
          end, c.transposed ? s.high : s.low);
  };
}

// What depends on a convolution's sizes alone: low [n, cl, h, w], the high side's others, and how
// they are tied.
template <class... Others>
auto of_sizes(int (*count)(ConvShape, Others...)) {
  return [count](int n, int cl, int h, int w, int ch, int high_h, int high_w, int kernel_h,
                 int kernel_w, int stride, int padding, Others... others) {
    return count({n, h, w, cl, ch, high_h, high_w, kernel_h, kernel_w, stride, padding}, others...);
  };
}

// Of a weight gradient by tiles of rows x columns.
int wgrad_parts(ConvShape s, int rows, int columns, int multiprocessors) {
  return conv_wgrad_parts(s, {rows, columns}, multiprocessors);
}

void bind_conv(py::module_& m) {
  for (const Forward& c : kForward) {
    m.def(c.name, conv_forward(c));
    m.def((std::string(c.name) + "_stats_tiles").c_str(), of_sizes(c.stats_tiles));
  }
  m.def("conv_wgrad_parts", of_sizes(wgrad_parts));
  m.def("conv_wgrad", [](int stride, int padding, const Choice& choice, const Array& low,
                         const Array& high, const Array& dweight, const Array* sums,
                         uintptr_t stream) {
    Call call("conv_wgrad");
    const Product product = product_of(call, choice, true);
    const Sides s = sides(call, stride, padding, low, high, dweight);
    check_product(call, s.shape);
    int parts = 1;
    float* shares = nullptr;
    if (sums) {
      call.require(sums->shape.size() == 2, "sums " + text(sums->shape) + " is not [parts, size]");
      parts = int(sums->shape[0]);
      shares = call.floats("sums", *sums, {parts, count_of(dweight.shape)});
    }
    conv_wgrad(call.on(stream), s.shape, call.dtype(), product.sides, product.tf32, s.low, s.high,
               parts, shares, s.weight);
  });
}

BatchNormShape batch_norm_shape(const Call& call, const Array& x, int groups) {
  check_groups(call, groups, x.shape[0]);
  return {groups, int(x.shape[0] / groups * x.shape[2] * x.shape[3]), int(x.shape[1])};
}

// How many tiles each group has of [groups · tiles, values, channels].
int tiles_of(Call& call, const char* argument, const Array& a, BatchNormShape s, int values) {
  call.require(a.shape.size() == 3 && a.shape[0] % s.groups == 0 && a.shape[1] == values &&
                   a.shape[2] == s.channels,
               std::string(argument) + " " + text(a.shape) + " is not [" +
                   std::to_string(s.groups) + " · tiles, " + std::to_string(values) + ", " +
                   std::to_string(s.channels) + "]");
  return int(a.shape[0]) / s.groups;
}

void bind_bn_act(py::module_& m) {
  m.def("bn_most_tiles", &bn_most_tiles);
  m.def("bn_tiles", [](int groups, int rows, int channels, const std::string& dtype) {
    return bn_tiles({groups, rows, channels}, dtype_named(dtype));
  });
  m.def("bn_stats", [](const Array& x, const Array& stats, int groups, uintptr_t stream) {
    Call call("bn_stats");
    const void* data = call.images("x", x);
    const BatchNormShape s = batch_norm_shape(call, x, groups);
    const int tiles = tiles_of(call, "stats", stats, s, 3);
    float* out = call.floats("stats", stats, stats.shape);
    bn_stats(call.on(stream), s, call.dtype(), data, out, tiles);
  });
  m.def("bn_fold", [](const Array& stats, const Array& folded, int groups, uintptr_t stream) {
    Call call("bn_fold");
    call.require(groups >= 1 && stats.shape.size() == 3, "stats " + text(stats.shape) +
                                                             " is not [groups · tiles, 3, C]");
    const BatchNormShape s{groups, 0, int(stats.shape[2])};
    const int tiles = tiles_of(call, "stats", stats, s, 3);
    const int to = tiles_of(call, "folded", folded, s, 3);
    const float* from = call.floats("stats", stats, stats.shape);
    float* out = call.floats("folded", folded, folded.shape);
    bn_fold(call.on(stream), s, from, tiles, out, to);
  });
  m.def("bn_act_forward", [](const Array& x, const Array* stats, float eps, const Array& mean,
                             const Array& invstd, const Array* var, const Array* weight,
                             const Array* bias, int activation, float negative_slope,
                             const Array& y, uintptr_t stream) {
    Call call("bn_act_forward");
    const void* from = call.images("x", x);
    call.require(!mean.shape.empty(), "mean " + text(mean.shape) + " is not [groups, C]");
    const BatchNormShape s = batch_norm_shape(call, x, int(mean.shape[0]));
    const Sizes each = {s.groups, s.channels};
    const int tiles = stats ? tiles_of(call, "stats", *stats, s, 3) : 0;
    call.require(tiles <= bn_most_tiles(), "stats has " + std::to_string(tiles) +
                                               " tiles of a group: fold them to at most " +
                                               std::to_string(bn_most_tiles()));
    call.require(!stats || var, "var should be given where stats is");
    const float* sums = stats ? call.floats("stats", *stats, stats->shape) : nullptr;
    float* m = call.floats("mean", mean, each);
    float* i = call.floats("invstd", invstd, each);
    float* v = var ? call.floats("var", *var, each) : nullptr;
    const PerChannel w = call.per_channel("weight", weight, s.channels);
    const PerChannel b = call.per_channel("bias", bias, s.channels);
    const Act act = call.act(activation, negative_slope);
    void* to = call.images("y", y, x.shape);
    bn_act_forward(call.on(stream), s, call.dtype(), from, sums, tiles, eps, m, i, v, w, b, act,
                   to);
  });
  m.def("bn_act_backward", [](const Array& dy, const Array& x, const Array& mean,
                              const Array& invstd, const Array* weight, const Array* bias,
                              bool training, int activation, float negative_slope,
                              const Array& dx, const Array& dweight, const Array& dbias,
                              const Array& sums, uintptr_t stream) {
    Call call("bn_act_backward");
    const void* from = call.images("x", x);
    const void* d = call.images("dy", dy, x.shape);
    call.require(!mean.shape.empty(), "mean " + text(mean.shape) + " is not [groups, C]");
    const BatchNormShape s = batch_norm_shape(call, x, int(mean.shape[0]));
    const Sizes each = {s.groups, s.channels};
    const float* m = call.floats("mean", mean, each);
    const float* i = call.floats("invstd", invstd, each);
    const PerChannel w = call.per_channel("weight", weight, s.channels);
    const PerChannel b = call.per_channel("bias", bias, s.channels);
    const Act act = call.act(activation, negative_slope);
    void* to = call.images("dx", dx, x.shape);
    const PerChannel dw = call.per_channel("dweight", &dweight, s.channels);
    const PerChannel db = call.per_channel("dbias", &dbias, s.channels);
    float* scratch =
        call.floats("sums", sums, {s.groups * bn_tiles(s, call.dtype()), 2, s.channels});
    bn_act_backward(call.on(stream), s, call.dtype(), d, from, m, i, w, b, training, act, scratch,
                    to, dw, db);
  });
  m.def("bn_update_running", [](const Array& mean, const Array& var, int rows, float momentum,
                                const Array& running_mean, const Array& running_var,
                                uintptr_t stream) {
    Call call("bn_update_running");
    call.require(mean.shape.size() == 2, "mean " + text(mean.shape) + " is not [groups, C]");
    call.require(rows > 1, "rows " + std::to_string(rows) + ": one value has no variance");
    const int groups = int(mean.shape[0]), channels = int(mean.shape[1]);
    const float* m = call.floats("mean", mean, mean.shape);
    const float* v = call.floats("var", var, mean.shape);
    const PerChannel rm = call.per_channel("running_mean", &running_mean, channels);
    const PerChannel rv = call.per_channel("running_var", &running_var, channels);
    const float unbiased = float(double(rows) / double(rows - 1));
    bn_update_running(call.on(stream), groups, channels, m, v, momentum, unbiased, rm, rv);
  });
}

void bind_gan_loss(py::module_& m) {
  m.def("gan_loss_forward", [](const Array& logits, const std::vector<float>& targets, int kind,
                               const Array& loss, const Array& d, const Array& dlogits,
                               uintptr_t stream) {
    Call call("gan_loss_forward");
    const int64_t groups = int64_t(targets.size());
    call.require(1 <= groups && groups <= kMostTargets,
                 std::to_string(groups) + " targets: one launch takes 1 to " +
                     std::to_string(kMostTargets));
    call.require(0 <= kind && kind <= int(GanLoss::kWasserstein),
                 "kind " + std::to_string(kind) +
                     " should be 0 bce, 1 lsgan, 2 hinge or 3 wasserstein");
    call.require(floating(logits.dtype), "logits: the kernels take float32, bfloat16, float16");
    const void* from = call.plain("logits", logits, logits.dtype, logits.shape);
    const int64_t size = count_of(logits.shape);
    call.require(size % groups == 0, std::to_string(groups) + " targets should divide the " +
                                         std::to_string(size) + " logits");
    Targets of{};
    std::copy(targets.begin(), targets.end(), of.of);
    void* loss_to = call.plain("loss", loss, logits.dtype, {groups});
    void* d_to = call.plain("d", d, logits.dtype, {groups});
    void* dlogits_to = call.plain("dlogits", dlogits, logits.dtype, logits.shape);
    gan_loss_forward(call.on(stream), int(groups), int(size / groups), logits.dtype, from, of,
                     GanLoss(kind), loss_to, d_to, dlogits_to);
  });
}

void bind_augment(py::module_& m) {
  m.attr("MOST_ROW_BYTES") = kMostRowBytes;
  m.def("augment_forward", [](const Array& images, const Array* index, const Array* flip,
                              const Array& out, uintptr_t stream) {
    Call call("augment_forward");
    call.require(images.shape.size() == 4, "images " + text(images.shape) + " is not [M, H, W, C]");
    const int64_t h = images.shape[1], w = images.shape[2], c = images.shape[3];
    call.require(w * c <= kMostRowBytes, "images " + text(images.shape) + ": a row of " +
                                             std::to_string(w * c) + " bytes is longer than " +
                                             std::to_string(kMostRowBytes));
    // The set may be larger than 32 bits count: the kernel counts images apart.
    const void* from = call.plain("images", images, Dtype::kUInt8, images.shape, INT64_MAX);
    void* to = call.images("out", out);
    const int64_t n = out.shape[0];
    call.require(out.shape == Sizes{n, c, h, w} && (index || n == images.shape[0]),
                 "out " + text(out.shape) + " should be [N, C, H, W] of images " +
                     text(images.shape));
    const void* chosen = index ? call.plain("index", *index, Dtype::kInt64, {n}) : nullptr;
    const void* flipped = flip ? call.plain("flip", *flip, Dtype::kBool, {n}) : nullptr;
    augment_forward(call.on(stream), int(n), int(h), int(w), int(c),
                    static_cast<const uint8_t*>(from), static_cast<const int64_t*>(chosen),
                    static_cast<const bool*>(flipped), call.dtype(), to);
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels: NHWC, float32, bfloat16 or float16; see csrc/cuda/kernels.h.";

  py::class_<Array>(m, "Array", py::module_local(),
                    "Device memory: an address, and strides in elements.")
      .def(py::init([](uintptr_t address, const std::string& dtype, int device, Sizes shape,
                       Sizes strides) {
             if (shape.size() != strides.size())
               throw std::invalid_argument("shape " + text(shape) + " and strides " +
                                           text(strides) + " should be as long as one another");
             return Array{reinterpret_cast<void*>(address), dtype_named(dtype), device,
                          std::move(shape), std::move(strides)};
           }),
           py::arg("address"), py::arg("dtype"), py::arg("device"), py::arg("shape"),
           py::arg("strides"));

  bind_conv(m);
  bind_bn_act(m);
  bind_gan_loss(m);
  bind_augment(m);
  m.def("act_backward", [](const Array& dy, const Array& y, int activation, float negative_slope,
                           const Array& dx, uintptr_t stream) {
    Call call("act_backward");
    const void* from = call.images("y", y);
    const void* d = call.images("dy", dy, y.shape);
    const Act act = call.act(activation, negative_slope);
    void* to = call.images("dx", dx, y.shape);
    act_backward(call.on(stream), count_of(y.shape), call.dtype(), d, from, act, to);
  });
}
