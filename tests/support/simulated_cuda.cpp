// CUDA devices for a torch without a GPU: what lies on them lies in the host's memory.
//
// A tensor here is torch's own, of device cuda:i and with the dispatch keys of CUDA, so everything
// above the kernels is what runs on a GPU: autograd and its threads, autocast, custom ops, the
// choice of devices. Only the kernels are replaced: `on_host` takes the place of every one that
// torch has or could have for CUDA, and calls that for the CPU on the same memory.
//
// support/simulated_cuda.py says what is noted and what is not simulated.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <mutex>
#include <set>
#include <sstream>
#include <unordered_map>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;
using c10::StorageImpl;
using c10::Stream;
using torch::jit::Stack;

std::atomic<DeviceIndex> device_count{1};
thread_local DeviceIndex current_device = 0;

Device checked(Device device) {
  if (device.index() < 0) return {DeviceType::CUDA, current_device};
  TORCH_CHECK(device.index() < device_count, "CUDA error: invalid device ordinal");
  return device;
}

// Notes: what crosses between host and device, and what makes the host wait for the device.

std::mutex notes_mutex;
std::vector<std::string> notes;

void note(const std::string& what) {
  const std::lock_guard<std::mutex> lock(notes_mutex);
  notes.push_back(what);
}

void note(const std::string& kind, const std::string& op, const Tensor& x) {
  std::ostringstream text;
  text << kind << ' ' << op << ' ' << c10::toString(x.scalar_type()) << ' ' << x.sizes();
  note(text.str());
}

std::vector<std::string> take_notes() {
  const std::lock_guard<std::mutex> lock(notes_mutex);
  return std::exchange(notes, {});
}

// Memory: a storage of a device owns one of the host, of the same bytes.

void release(void* host) { delete static_cast<Storage*>(host); }

c10::DataPtr over(const Storage& host, Device device) {
  return {host.mutable_data(), new Storage(host), &release, device};
}

Storage host_of(const Storage& storage) {
  const auto& data = storage.data_ptr();
  TORCH_CHECK(data.get_deleter() == &release, "memory of no simulated device");
  return *static_cast<Storage*>(data.get_context());
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return over(Storage(Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), true),
                checked(DeviceType::CUDA));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} allocator;

Storage device_of(const Storage& host, Device device) {
  return Storage(Storage::use_byte_size_t(), host.nbytes(), over(host, device), &allocator, true);
}

Tensor tensor_over(Storage storage, DispatchKey key, const Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key),
                                                       like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                    like.storage_offset());
  return made;
}

Tensor host_view(const Tensor& x) {
  if (!x.is_cuda()) return x;
  return tensor_over(host_of(x.storage()), DispatchKey::CPU, x);
}

// Memory of the host that a device copies from without the host's help.
struct Pinned final : c10::Allocator {
  static inline std::mutex mutex;
  static inline std::set<const void*> blocks;

  static bool holds(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    return blocks.count(data) > 0;
  }
  static void unpin(void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    blocks.erase(data);
    c10::GetCPUAllocator()->raw_deleter()(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
    const std::lock_guard<std::mutex> lock(mutex);
    blocks.insert(data);
    return {data, data, &unpin, DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} pinned;

// Random numbers: a generator of a device hands out those of one for the CPU.

struct Generator final : c10::GeneratorImpl {
  at::Generator host;

  Generator(Device device, at::Generator host)
      : GeneratorImpl(device, DispatchKeySet(DispatchKey::CUDA)), host(std::move(host)) {}

  static at::Generator make(Device device) {
    return at::make_generator<Generator>(device, at::detail::createCPUGenerator());
  }
  static DeviceType device_type() { return DeviceType::CUDA; }
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.unsafeGetGeneratorImpl()->get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return const_cast<at::Generator&>(host).seed(); }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(device_, host.clone()); }
};

const at::Generator& default_generator(DeviceIndex index) {
  static std::mutex mutex;
  static std::map<DeviceIndex, at::Generator> made;
  const std::lock_guard<std::mutex> lock(mutex);
  const Device device(DeviceType::CUDA, index < 0 ? current_device : index);
  auto& found = made[device.index()];
  if (!found.defined()) found = Generator::make(device);
  return found;
}

at::Generator host_of(const at::Generator& generator) {
  const auto* ours = dynamic_cast<Generator*>(generator.unsafeGetGeneratorImpl());
  TORCH_CHECK(ours, "Expected a 'cuda' device type for generator but found '",
              generator.device().type(), "'");
  return ours->host;
}

// Kernels.

const std::set<std::string> waiting = {
    "aten::_local_scalar_dense", "aten::nonzero",     "aten::masked_select",
    "aten::equal",               "aten::_unique",     "aten::_unique2",
    "aten::unique_dim",          "aten::bincount",    "aten::unique_consecutive",
    "aten::repeat_interleave",   "aten::unique_dim_consecutive",
};
// Of these, tensors may lie on the host, and are copied to the device.
const std::set<std::string> indexing = {"aten::index", "aten::index_put_",
                                        "aten::_index_put_impl_"};

// One call of an operator, its arguments changed for their like on the host and back.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op), name_(op.schema().name()) {}

  void run(Stack* stack) {
    const auto& arguments = op_.schema().arguments();
    const auto given = torch::jit::pop(*stack, arguments.size());
    for (const auto& value : given) look_at(value);
    check_devices();
    check_rate(given);
    note_traffic(given);
    Stack host;
    for (size_t i = 0; i < given.size(); ++i) {
      // None is the device's generator, and not the one for the CPU.
      const bool draws = arguments[i].name() == "generator" && given[i].isNone();
      host.push_back(draws ? IValue(host_of(default_generator(device_.index())))
                           : to_host(given[i]));
    }
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      op_.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &host);
    }
    follow_changes();
    for (auto& value : host) stack->push_back(to_device(value));
  }

 private:
  template <class Seen>
  static void each_tensor(const IValue& value, Seen seen) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) seen(value.toTensor());
    } else if (value.isList()) {
      for (const IValue& element : value.toListRef()) each_tensor(element, seen);
    }
  }

  void look_at(const IValue& value) {
    each_tensor(value, [this](const Tensor& x) {
      if (x.is_cuda()) {
        devices_.insert(x.device().index());
        if (!found_) device_ = x.device();
        found_ = true;
      } else if (x.dim() > 0 || copies() || strict()) {
        on_host_ = x;
      } else if (!x.unsafeGetTensorImpl()->is_wrapped_number()) {
        number_ = x;
      }
    });
    if (value.isDevice() && !found_) device_ = checked(value.toDevice());
  }

  bool copies() const { return name_ == "aten::copy_"; }
  // Does not take a number of the host for a tensor of no dimensions.
  bool strict() const { return name_.rfind("aten::_foreach_", 0) == 0; }

  // As torch's own kernels do, one by one.
  void check_devices() const {
    if (copies()) return;
    const bool foreign = found_ && on_host_.defined() && !indexing.count(name_);
    TORCH_CHECK(!foreign && devices_.size() < 2,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                "cuda:", int(*devices_.begin()), " and ",
                foreign ? "cpu" : "cuda:" + std::to_string(int(*devices_.rbegin())),
                "! (in ", name_, ")");
  }

  // The fused optimisers, which on the CPU take any dtype.
  void check_rate(const std::vector<IValue>& given) const {
    const auto index = op_.schema().argumentIndexWithName("lr");
    if (!index || !given[*index].isTensor()) return;
    const Tensor& rate = given[*index].toTensor();
    TORCH_CHECK(!rate.is_cuda() || rate.scalar_type() == at::kFloat,
                "expected scalar type Float but found ", rate.scalar_type());
  }

  void note_traffic(const std::vector<IValue>& given) const {
    if (copies()) {
      const auto &to = given[0].toTensor(), &from = given[1].toTensor();
      if (to.device() == from.device()) return;
      const bool non_blocking = given[2].toBool();
      const bool pinned =
          non_blocking && Pinned::holds((to.is_cuda() ? from : to).storage().data());
      const std::string kind = !to.is_cuda()     ? "to_host"
                               : !from.is_cuda() ? "to_device"
                                                 : "between_devices";
      note(pinned ? kind + " pinned" : kind, name_, from);
      return;
    }
    if (found_ && number_.defined()) note("number", name_, number_);
    if (waiting.count(name_)) note("wait", name_, given[0].toTensor());
    if (!indexing.count(name_)) return;
    each_tensor(given[1], [this](const Tensor& index) {
      if (!index.is_cuda()) note("to_device", name_, index);
      // What is picked must be counted first.
      const bool mask = index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
      if (mask) note("wait", name_, index);
    });
  }

  IValue to_host(const IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& x : value.toTensorVector()) list.push_back(to_host(x));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const IValue& x : value.toListRef()) {
        list.push_back(x.isNone() ? std::optional<Tensor>() : to_host(x.toTensor()));
      }
      return list;
    }
    if (value.isDevice()) return Device(DeviceType::CPU);
    if (value.isGenerator()) return host_of(value.toGenerator());
    if (value.isStorage()) {
      const Storage storage = value.toStorage(), host = host_of(storage);
      storages_.emplace(host.unsafeGetStorageImpl(), storage);
      return host;
    }
    return value;
  }

  Tensor to_host(const Tensor& x) {
    if (!x.defined() || !x.is_cuda()) return x;
    const Tensor host = host_view(x);
    storages_.emplace(host.storage().unsafeGetStorageImpl(), x.storage());
    pairs_.emplace_back(x, host);
    return host;
  }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& x : value.toTensorVector()) list.push_back(to_device(x));
      return list;
    }
    return value;
  }

  Tensor to_device(const Tensor& x) {
    if (!x.defined()) return x;
    for (const auto& [device, host] : pairs_) {
      if (host.is_same(x)) return device;
    }
    // Where the destination of a copy is on the host, it is what is returned.
    if (on_host_.defined() && on_host_.is_same(x)) return x;
    return tensor_over(storage_of(x), DispatchKey::CUDA, x);
  }

  Storage storage_of(const Tensor& host) {
    auto* key = host.storage().unsafeGetStorageImpl();
    const auto found = storages_.find(key);
    if (found != storages_.end()) return found->second;
    return storages_.emplace(key, device_of(host.storage(), device_)).first->second;
  }

  // What an operator did to its arguments besides writing their elements.
  void follow_changes() {
    for (auto& [host, storage] : storages_) {
      if (host->data() == storage.data() && host->nbytes() == storage.nbytes()) continue;
      storage.set_data_ptr_noswap(over(host_of(storage), storage.device()));
      storage.set_nbytes(host->nbytes());
    }
    for (auto& [device, host] : pairs_) {
      auto* impl = device.unsafeGetTensorImpl();
      const Storage storage = storage_of(host);
      if (!storage.is_alias_of(device.storage())) impl->set_storage_keep_dtype(storage);
      const bool same = device.sizes() == host.sizes() && device.strides() == host.strides() &&
                        device.storage_offset() == host.storage_offset();
      if (!same) impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  const c10::OperatorHandle& op_;
  const std::string name_;
  Device device_{DeviceType::CUDA, current_device};
  bool found_ = false;
  std::set<DeviceIndex> devices_;
  Tensor on_host_, number_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
  std::unordered_map<StorageImpl*, Storage> storages_;
};

void on_host(const c10::OperatorHandle& op, Stack* stack) { Call(op).run(stack); }

// torch says, once, that a kernel has taken the place of another: here it is meant to.
struct Quiet final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void replace_kernels() {
  static torch::Library library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__,
                                __LINE__);
  Quiet quiet;
  const c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.getNamespace() != "aten") continue;
    const auto op = dispatcher.findSchema(name);
    if (!op) continue;
    // What has a kernel for neither is made of others, but for the copy between devices.
    if (op->hasKernelForDispatchKey(DispatchKey::CPU) ||
        op->hasKernelForDispatchKey(DispatchKey::CUDA) || name.name == "aten::copy_") {
      const auto full = name.overload_name.empty() ? name.name
                                                   : name.name + "." + name.overload_name;
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_host>());
    }
  }
}

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return device_count; }
  DeviceIndex deviceCount() const override { return device_count; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { ::current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(::current_device, index);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return exchangeDevice(index < 0 ? ::current_device : index);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return Generator::make(checked({DeviceType::CUDA, index}));
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void* data) const override { return Pinned::holds(data); }
  void deviceSynchronize(DeviceIndex) const override { note("wait synchronize"); }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return {DeviceType::CUDA, current_device}; }
  Device exchangeDevice(Device device) const override {
    return {DeviceType::CUDA, std::exchange(current_device, device.index())};
  }
  void setDevice(Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override {
    current_device = device.index();
  }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { note("wait synchronize"); }
  void synchronizeEvent(void*) const override { note("wait synchronize"); }
  void synchronizeDevice(DeviceIndex) const override { note("wait synchronize"); }
};

// torch looks for a GPU, and keeps what it finds, while it is imported. Where it was built for CUDA
// it has hooks of its own then, which are to find these neither in their place nor in use.
const bool found_first = [] {
  auto* registry = at::CUDAHooksRegistry();
  if (registry->Has("CUDAHooks")) return false;
  registry->Register(
      "CUDAHooks", [](at::CUDAHooksArgs) { return std::make_unique<Hooks>(); },
      c10::REGISTRY_FALLBACK);
  return at::detail::getCUDAHooks().isAvailable();
}();

void install() {
  TORCH_CHECK(found_first, "torch was imported before the simulation of CUDA was loaded");
  static Guard guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
  c10::SetAllocator(DeviceType::CUDA, &allocator, 255);
  replace_kernels();
}

}  // namespace

TORCH_LIBRARY(simulated_cuda, m) {
  m.def("install", &install);
  m.def("host_view(Tensor x) -> Tensor", torch::dispatch(DispatchKey::CompositeExplicitAutograd,
                                                         &host_view));
  m.def("take_notes", &take_notes);
  m.def("note", [](const std::string& what) { note(what); });
  m.def("set_device_count", [](int64_t count) { device_count = DeviceIndex(count); });
  m.def("device_count", []() { return int64_t(device_count); });
  m.def("current_device", []() { return int64_t(current_device); });
  m.def("exchange_device", [](int64_t index) {
    const auto to = index < 0 ? current_device : checked(Device(DeviceType::CUDA, index)).index();
    return int64_t(std::exchange(current_device, to));
  });
  m.def("default_generator", [](int64_t index) { return default_generator(DeviceIndex(index)); });
}
