// A CUDA device that is not there: tensors say "cuda:0", their bytes lie in host memory, and every operator is the
// CPU's, run on the same bytes. What is kept of the real device is what programs get wrong: operands of two devices
// are an error, host and device have separate tensors, calls that would wait for the device are counted and can be
// refused, and the bytes that live on the device, with their peak.
//
// Only for a torch that was built without CUDA: the dispatch key and the device's slots are free there.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <unordered_set>

namespace {

// Of eight, the one that this process works on: torchrun says which.
c10::Device own_gpu() {
  const char* rank = std::getenv("LOCAL_RANK");
  return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(rank ? std::atoi(rank) : 0)};
}
const c10::Device kGpu = own_gpu();

bool is_own(std::optional<c10::Device> device) {
  if (!device.has_value() || !device->is_cuda()) return false;
  TORCH_CHECK(
      !device->has_index() || device->index() == kGpu.index(), "a tensor is asked for on ", *device,
      ", and this process works on ", kGpu, " (simulated)");
  return true;
}

// ---------------------------------------------------------------- memory

std::atomic<int64_t> in_use{0}, peak{0};

void count(int64_t bytes) {
  const int64_t now = in_use += bytes;
  for (int64_t most = peak; now > most && !peak.compare_exchange_weak(most, now);) {
  }
}

// Owns what the pointer really belongs to; the bytes are the device's for as long.
struct Owner {
  c10::DataPtr memory;
  c10::Storage storage;
  int64_t bytes;
};

void release(void* owner) {
  auto* one = static_cast<Owner*>(owner);
  count(-one->bytes);
  delete one;
}

c10::DataPtr owned(void* address, Owner* owner) {
  count(owner->bytes);
  return {address, owner, &release, kGpu};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto* owner = new Owner{c10::GetAllocator(c10::DeviceType::CPU)->allocate(size), {}, static_cast<int64_t>(size)};
    return owned(owner->memory.get(), owner);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
Allocator allocator;

// Pinned memory of the host is any memory; what counts is that it says so.
std::mutex pinned_mutex;
std::unordered_set<const void*> pinned;

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto memory = c10::GetAllocator(c10::DeviceType::CPU)->allocate(size);
    auto* owner = new c10::DataPtr(std::move(memory));
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(owner->get());
    return {owner->get(), owner, &unpin, c10::kCPU};
  }
  static void unpin(void* owner) {
    auto* memory = static_cast<c10::DataPtr*>(owner);
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned.erase(memory->get());
    }
    delete memory;
  }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
Pinned pinned_allocator;

// ---------------------------------------------------------------- the device itself

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kGpu; }
  c10::Device getDevice() const override { return kGpu; }
  c10::DeviceIndex deviceCount() const noexcept override { return 8; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 8; }
  c10::DeviceIndex current_device() const override { return kGpu.index(); }
  c10::DeviceIndex getCurrentDevice() const override { return kGpu.index(); }
  int getNumGPUs() const override { return 8; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  c10::Device getDeviceFromPtr(void*) const override { return kGpu; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.count(data) > 0;
  }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  // Random numbers are the host's.
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::globalContext().defaultGenerator(c10::Device(c10::kCPU));
  }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// ---------------------------------------------------------------- host and device tensors over the same bytes

c10::intrusive_ptr<c10::TensorImpl> over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = c10::make_intrusive<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// A device tensor over the storage of another; in inference mode, one that counts versions if the other does.
at::Tensor view(const at::Tensor& base, const at::Tensor& like) {
  auto made = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), like.dtype());
  made->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return at::Tensor(std::move(made));
}

// A host tensor over a device tensor's bytes. It keeps them alive.
at::Tensor on_host(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  auto* keep = new c10::Storage(storage);
  c10::DataPtr memory(storage.mutable_data(), keep, [](void* one) { delete static_cast<c10::Storage*>(one); }, c10::kCPU);
  c10::Storage host(
      c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetAllocator(c10::DeviceType::CPU), true);
  auto made = at::Tensor(over(std::move(host), c10::DispatchKey::CPU, tensor));
  if (tensor.is_conj()) made.unsafeGetTensorImpl()->_set_conj(true);
  if (tensor.is_neg()) made.unsafeGetTensorImpl()->_set_neg(true);
  return made;
}

// A device tensor over a host tensor's bytes, which are the device's from now on.
at::Tensor on_device(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  auto* owner = new Owner{{}, storage, static_cast<int64_t>(storage.nbytes())};
  c10::Storage device(
      c10::Storage::use_byte_size_t(), storage.nbytes(), owned(storage.mutable_data(), owner), &allocator, true);
  return at::Tensor(over(std::move(device), c10::DispatchKey::CUDA, tensor));
}

// An operator may have given its output other sizes, in other memory.
void follow(const at::Tensor& given, const at::Tensor& host) {
  if (host.storage().data() != given.storage().data()) {
    const c10::Storage& storage = host.storage();
    auto* owner = new Owner{{}, storage, static_cast<int64_t>(storage.nbytes())};
    auto* own = given.storage().unsafeGetStorageImpl();
    own->set_data_ptr_noswap(owned(storage.mutable_data(), owner));
    own->set_nbytes(storage.nbytes());
  }
  if (given.sizes() != host.sizes() || given.strides() != host.strides())
    given.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
}

// ---------------------------------------------------------------- what waits for the device

std::mutex mutex;
std::map<std::string, int64_t> waits;  // operator: calls that waited
std::atomic<int> wait_mode{0};         // 2: they are errors

void wait(const std::string& name) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    ++waits[name];
  }
  TORCH_CHECK(wait_mode != 2, "called a synchronizing CUDA operation (simulated): ", name);
}

const std::unordered_set<std::string> kWaiting = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
};

bool has_mask(const c10::IValue& value) {
  if (value.isTensor()) {
    const auto type = value.toTensor().defined() ? value.toTensor().scalar_type() : at::kFloat;
    return type == at::kBool || type == at::kByte;
  }
  if (!value.isList()) return false;
  for (const c10::IValue& one : value.toListRef())
    if (has_mask(one)) return true;
  return false;
}

// ---------------------------------------------------------------- which devices may meet

const std::unordered_set<std::string> kMixed = {  // these move data, or take indices of the host
    "aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
    "aten::_foreach_copy_", "aten::record_stream", "aten::set_",
};
const std::unordered_set<std::string> kStrict = {  // a host scalar is an error too
    "aten::mm", "aten::addmm", "aten::bmm", "aten::cat", "aten::index_select", "aten::gather", "aten::scatter",
    "aten::scatter_", "aten::scatter_add", "aten::scatter_add_", "aten::embedding", "aten::index_add_",
    "aten::_foreach_mul_", "aten::topk", "aten::sort",
};

void check_devices(const std::string& name, const std::vector<at::Tensor>& tensors) {
  if (kMixed.count(name)) return;
  const bool strict = kStrict.count(name);
  for (const auto& tensor : tensors)
    TORCH_CHECK(
        tensor.is_cuda() || (tensor.dim() == 0 && !strict),
        "Expected all tensors to be on the same device, but found at least two devices, ", kGpu, " and ", tensor.device(), "! (simulated, in ", name, ", a tensor of sizes ", tensor.sizes(), ")");
}

// ---------------------------------------------------------------- every operator

using Pairs = std::vector<std::pair<at::Tensor, at::Tensor>>;  // (as given, over the same bytes on the host)

c10::IValue map(const c10::IValue& value, const std::function<at::Tensor(const at::Tensor&)>& change) {
  if (value.isTensor()) {
    const auto& tensor = value.toTensor();
    return tensor.defined() ? c10::IValue(change(tensor)) : value;
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& one : value.toTensorVector()) made.push_back(one.defined() ? change(one) : one);
    return made;
  }
  if (value.isList() && value.toListRef().size() && value.toListRef()[0].isTensorList()) {
    c10::List<c10::List<at::Tensor>> made;
    for (const c10::IValue& one : value.toListRef()) made.push_back(map(one, change).toTensorList());
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> made;
    for (const std::optional<at::Tensor>& one : value.toOptionalTensorList())
      made.push_back(one.has_value() && one->defined() ? std::optional<at::Tensor>(change(*one)) : one);
    return made;
  }
  return value;
}

void run(const c10::OperatorHandle& op, c10::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  std::vector<at::Tensor> seen;
  Pairs pairs;
  bool to_device = false, has_device = false, non_blocking = false, mask = false;
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[first + i];
    const std::string& argument = schema.arguments()[i].name();
    if (argument == "non_blocking" && value.isBool()) non_blocking = value.toBool();
    if (value.isDevice()) {
      has_device = true;
      to_device = is_own(value.toDevice());
      value = c10::Device(c10::kCPU);
      continue;
    }
    if (argument == "indices" || argument == "mask") mask = mask || has_mask(value);
    value = map(value, [&](const at::Tensor& tensor) {
      seen.push_back(tensor);
      if (!tensor.is_cuda()) {
        pairs.emplace_back(tensor, tensor);
        return tensor;
      }
      // One argument twice stays one.
      for (const auto& [given, host] : pairs)
        if (given.is_same(tensor)) return host;
      pairs.emplace_back(tensor, on_host(tensor));
      return pairs.back().second;
    });
  }
  check_devices(name, seen);
  const bool moves = name == "aten::copy_" || name == "aten::_copy_from";
  bool crosses = false;
  for (const auto& tensor : seen) crosses = crosses || (tensor.is_cuda() != seen[0].is_cuda());
  if (moves ? crosses && !non_blocking : kWaiting.count(name) > 0) wait(name);
  if (mask && (name == "aten::index_put_" || name == "aten::_index_put_impl_"))  // reading by one calls nonzero
    wait(name + " by a mask");
  if (name == "aten::repeat_interleave" && count == 2 && (*stack)[first + 1].isNone()) wait(name);

  op.callBoxed(*stack);
  for (const auto& [given, host] : pairs)
    if (given.is_cuda()) follow(given, host);

  const size_t results = schema.returns().size();
  const bool on_gpu = has_device ? to_device : true;
  for (size_t i = stack->size() - results; i < stack->size(); ++i) {
    (*stack)[i] = map((*stack)[i], [&](const at::Tensor& result) {
      for (const auto& [given, host] : pairs) {
        if (result.is_same(host)) return given;
      }
      for (const auto& [given, host] : pairs)  // a view
        if (given.is_cuda() && result.storage().is_alias_of(host.storage()))
          return view(given, result);
      return on_gpu ? on_device(result) : result;
    });
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

// ---------------------------------------------------------------- operators that make or resize tensors

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  is_own(device);
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  is_own(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

void resize_storage(c10::StorageImpl* storage, size_t bytes) {
  auto memory = allocator.allocate(bytes);
  const auto kept = std::min(storage->nbytes(), bytes);
  if (kept) std::memcpy(memory.get(), storage->mutable_data(), kept);
  storage->set_data_ptr_noswap(std::move(memory));
  storage->set_nbytes(bytes);
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  const size_t needed = (self.storage_offset() + self.numel()) * self.itemsize();
  if (needed > self.storage().nbytes()) resize_storage(self.storage().unsafeGetStorageImpl(), needed);
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_contiguous(count);
  impl->set_storage_offset(0);
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

// Scores and softmax as they are written: what FlashAttention is compared with.
int64_t which_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;
}

// ---------------------------------------------------------------- GEMMs that only CUDA has

// Half-precision operands, products and sums in float32, as cuBLAS does it.
at::Tensor wide(const at::Tensor& x, at::ScalarType dtype) {
  TORCH_CHECK(
      x.scalar_type() == dtype || dtype == at::kFloat, "out_dtype must be the operands' dtype or float32, not ", dtype);
  return x.to(dtype);
}

at::Tensor& mm_out(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, at::Tensor& out) {
  TORCH_CHECK(out.scalar_type() == dtype, "mm: out has dtype ", out.scalar_type(), ", out_dtype is ", dtype);
  return at::mm_out(out, wide(a, dtype), wide(b, dtype));
}

at::Tensor mm(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  return at::mm(wide(a, dtype), wide(b, dtype));
}

at::Tensor& addmm_out(
    const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
    const at::Scalar& alpha, at::Tensor& out) {
  TORCH_CHECK(
      self.scalar_type() == dtype || self.scalar_type() == a.scalar_type(),
      "addmm: self has dtype ", self.scalar_type(), ", out_dtype is ", dtype);
  TORCH_CHECK(out.scalar_type() == dtype, "addmm: out has dtype ", out.scalar_type(), ", out_dtype is ", dtype);
  return at::addmm_out(out, wide(self, dtype), wide(a, dtype), wide(b, dtype), beta, alpha);
}

at::Tensor addmm(
    const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
    const at::Scalar& alpha) {
  return at::addmm(wide(self, dtype), wide(a, dtype), wide(b, dtype), beta, alpha);
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  // One kernel for all devices in torch, which asks for a part of CUDA's own.
  for (const char* name : {"copy_"}) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("_fused_sdp_choice", TORCH_FN(which_attention));
  m.impl("mm.dtype", TORCH_FN(mm));
  m.impl("mm.dtype_out", TORCH_FN(mm_out));
  m.impl("addmm.dtype", TORCH_FN(addmm));
  m.impl("addmm.dtype_out", TORCH_FN(addmm_out));
}

// Collectives of device tensors run on the process group's host backend, over the same bytes.
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name :
       {"allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_", "allgather_coalesced_",
        "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "alltoall_", "alltoall_base_", "barrier",
        "broadcast_", "send", "recv_", "recv_any_source_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}

const bool ready = [] {
  c10::SetAllocator(c10::DeviceType::CUDA, &allocator);
  return true;
}();

}  // namespace

// ---------------------------------------------------------------- for Python

extern "C" {
void gpu_resize_storage(void* storage, int64_t bytes) {
  resize_storage(static_cast<c10::StorageImpl*>(storage), bytes);
}
int64_t gpu_memory() { return in_use; }
int64_t gpu_peak() { return peak; }
void gpu_reset_peak() { peak.store(in_use); }
void gpu_wait_mode(int mode) { wait_mode = mode; }
// What waited since the last call, "operator calls" a line; valid until the next call.
const char* gpu_take_waits() {
  static std::string text;
  std::lock_guard<std::mutex> lock(mutex);
  text.clear();
  for (const auto& [name, calls] : waits) text += name + " " + std::to_string(calls) + "\n";
  waits.clear();
  return text.c_str();
}
}
