// fastgan._cuda: the kernels for Python, as descriptions of device memory that are checked, and a
// stream. Nothing is allocated and nothing waited for: a call returns when its kernels are queued.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arrays.h"
#include "kernels.h"

namespace py = pybind11;
using namespace fastgan;

namespace {

// The launches of one kind of convolution, and what they need.
struct Convolution {
  const char *fprop_name, *dgrad_name, *wgrad_name;
  bool thin;
  int (*fprop_stats_tiles)(ConvShape, int);
  int (*dgrad_stats_tiles)(ConvShape, int);
  int (*wgrad_parts)(ConvShape, int);
  decltype(&thin_fprop) fprop;
  decltype(&thin_dgrad) dgrad;
  decltype(&thin_wgrad) wgrad;
};

constexpr Convolution kThin = {"thin_fprop",           "thin_dgrad",           "thin_wgrad", true,
                               thin_fprop_stats_tiles, thin_dgrad_stats_tiles, thin_wgrad_parts,
                               thin_fprop,             thin_dgrad,             thin_wgrad};
constexpr Convolution kProjection = {"projection_fprop",
                                     "projection_dgrad",
                                     "projection_wgrad",
                                     false,
                                     projection_fprop_stats_tiles,
                                     projection_dgrad_stats_tiles,
                                     projection_wgrad_parts,
                                     projection_fprop,
                                     projection_dgrad,
                                     projection_wgrad};

struct Sides {
  ConvShape shape;
  void *low, *high, *weight;
};

Sides sides(Call& call, bool thin, const Array& low, const Array& high, const Array& weight) {
  Sides s{};
  s.low = call.images("low", low);
  s.high = call.images("high", high);
  s.shape = {int(low.shape[0]),  int(low.shape[2]),  int(low.shape[3]), int(low.shape[1]),
             int(high.shape[1]), int(high.shape[2]), int(high.shape[3])};
  const ConvShape& p = s.shape;
  const std::string both = "low " + text(low.shape) + " and high " + text(high.shape);
  call.require(high.shape[0] == p.n, both + " are of different batches");
  if (thin) {
    call.require(p.ch <= kMostThinChannels,
                 both + ": a thin high side has at most " + std::to_string(kMostThinChannels) +
                     " channels");
    call.require(p.high_h == 2 * p.h && p.high_w == 2 * p.w,
                 both + ": a thin high side is twice as high and wide as the low side");
    s.weight = call.images("weight", weight, {p.cl, p.ch, 4, 4});
  } else {
    call.require(p.h == 1 && p.w == 1, both + ": a projection's low side is 1x1");
    s.weight = call.images("weight", weight, {p.cl, p.ch, p.high_h, p.high_w});
  }
  return s;
}

void check_groups(const Call& call, int groups, int64_t n) {
  call.require(groups >= 1 && n % groups == 0,
               "groups " + std::to_string(groups) + " should divide the batch of " +
                   std::to_string(n));
}

// fprop, or dgrad where `transposed`.
auto conv_forward(const Convolution& c, bool transposed) {
  return [c, transposed](int groups, const Array& x, const Array& weight, const Array* bias,
                         int activation, float negative_slope, const Array& y, const Array* stats,
                         uintptr_t stream) {
    Call call(transposed ? c.dgrad_name : c.fprop_name);
    const Sides s =
        transposed ? sides(call, c.thin, x, y, weight) : sides(call, c.thin, y, x, weight);
    check_groups(call, groups, s.shape.n);
    const int channels = transposed ? s.shape.ch : s.shape.cl;
    ConvEpilogue end{call.per_channel("bias", bias, channels), call.act(activation, negative_slope),
                     nullptr, groups};
    const int tiles = (transposed ? c.dgrad_stats_tiles : c.fprop_stats_tiles)(s.shape, groups);
    if (stats) end.stats = call.floats("stats", *stats, {tiles, 3, channels});
    const Queue queue = call.on(stream);
    if (transposed)
      c.dgrad(queue, s.shape, call.dtype(), s.low, s.weight, end, s.high);
    else
      c.fprop(queue, s.shape, call.dtype(), s.high, s.weight, end, s.low);
  };
}

auto conv_wgrad(const Convolution& c) {
  return [c](const Array& low, const Array& high, const Array& dweight, const Array* sums,
             uintptr_t stream) {
    Call call(c.wgrad_name);
    const Sides s = sides(call, c.thin, low, high, dweight);
    int parts = 1;
    float* shares = nullptr;
    if (sums) {
      call.require(sums->shape.size() == 2, "sums " + text(sums->shape) + " is not [parts, size]");
      parts = int(sums->shape[0]);
      shares = call.floats("sums", *sums, {parts, count_of(dweight.shape)});
    }
    c.wgrad(call.on(stream), s.shape, call.dtype(), s.low, s.high, parts, shares, s.weight);
  };
}

// What depends on a convolution's sizes alone: low [n, cl, h, w] and the high side's others.
auto of_sizes(int (*count)(ConvShape, int)) {
  return [count](int n, int cl, int h, int w, int ch, int high_h, int high_w, int other) {
    return count({n, h, w, cl, ch, high_h, high_w}, other);
  };
}

void bind(py::module_& m, const Convolution& c) {
  const std::string fprop = c.fprop_name, dgrad = c.dgrad_name, wgrad = c.wgrad_name;
  m.def((fprop + "_stats_tiles").c_str(), of_sizes(c.fprop_stats_tiles));
  m.def((dgrad + "_stats_tiles").c_str(), of_sizes(c.dgrad_stats_tiles));
  m.def((wgrad + "_parts").c_str(), of_sizes(c.wgrad_parts));
  m.def(c.fprop_name, conv_forward(c, false));
  m.def(c.dgrad_name, conv_forward(c, true));
  m.def(c.wgrad_name, conv_wgrad(c));
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
  m.def("bce_forward", [](const Array& logits, const std::vector<float>& targets,
                          const Array& loss, const Array& d, const Array& dlogits,
                          uintptr_t stream) {
    Call call("bce_forward");
    const int64_t groups = int64_t(targets.size());
    call.require(1 <= groups && groups <= kMostTargets,
                 std::to_string(groups) + " targets: one launch takes 1 to " +
                     std::to_string(kMostTargets));
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
    bce_forward(call.on(stream), int(groups), int(size / groups), logits.dtype, from, of, loss_to,
                d_to, dlogits_to);
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

  bind(m, kThin);
  bind(m, kProjection);
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
