// A second device whose memory is the CPU's, so that one without a GPU shows what a GPU would: tensors that lie apart are
// refused by every operation, and what makes the host wait for a device is counted. All is computed on the CPU.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <mutex>
#include <string>

namespace {
using at::IntArrayRef;
using at::Tensor;
using std::optional;
constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
constexpr c10::DeviceIndex COUNT = 2;
thread_local c10::DeviceIndex current = 0;

// ---- what is counted

std::mutex lock;
bool counting = false;
thread_local bool within = false;  // an operation that is computed on the CPU is one, whatever it consists of
c10::Dict<std::string, int64_t> counts;

void note(const std::string& what) {
  std::lock_guard<std::mutex> hold(lock);
  if (counting && !within) counts.insert_or_assign(what, (counts.contains(what) ? counts.at(what) : 0) + 1);
}

struct Within {
  bool before = within;
  Within() { within = true; }
  ~Within() { within = before; }
};

void count(bool on) {
  std::lock_guard<std::mutex> hold(lock);
  if (on) counts.clear();
  counting = on;
}

c10::Dict<std::string, int64_t> counted() {
  std::lock_guard<std::mutex> hold(lock);
  return counts.copy();
}

// ---- the device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device getDevice() const override { return {KIND, current}; }
  c10::Device exchangeDevice(c10::Device d) const override {
    const c10::Device before = getDevice();
    current = d.index();
    return before;
  }
  void setDevice(c10::Device d) const override { current = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { current = d.index(); }
  c10::Stream getStream(c10::Device d) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const noexcept override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? c10::alloc_cpu(n) : nullptr;
    return {p, p, &c10::free_cpu, c10::Device(KIND, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t n) const override { default_copy_data(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::globalContext().defaultGenerator(c10::kCPU);
  }
  at::Device getDeviceFromPtr(void*) const override { return {KIND, current}; }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    at::native::resize_bytes_cpu(s.unsafeGetStorageImpl(), n);
  }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ---- memory and views

Tensor on_host(const Tensor& t) {  // the same memory as a tensor of the CPU
  if (t.device().type() != KIND) return t;
  auto* start = const_cast<void*>(t.storage().data());
  auto options = t.options().device(c10::kCPU);
  Tensor out = at::from_blob(start, t.sizes(), t.strides(), t.storage_offset(), [](void*) {}, options);
  out._set_conj(t.is_conj());
  out._set_neg(t.is_neg());
  return out;
}

Tensor on_device(const Tensor& t, at::Device d) {
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(d)).copy_(t);
}

void check_kind(at::Device d, optional<at::ScalarType> kind) {  // the second is like those that lack one
  TORCH_CHECK(d.index() != 1 || c10::dtype_or_default(kind) != at::kDouble, "this device has no double precision");
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device> device,
             optional<bool>, optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(at::Device(KIND, current)));
  check_kind(guard.current_device(), dtype);
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device> device, optional<bool>) {
  c10::DeviceGuard guard(device.value_or(at::Device(KIND, current)));
  check_kind(guard.current_device(), dtype);
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  if (to.is_cpu() != self.is_cpu()) note(to.is_cpu() ? "device to host" : "host to device");
  on_host(to).copy_(on_host(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  on_host(to).copy_(on_host(self));
  return to;
}

at::Scalar local_scalar_dense(const Tensor& t) {
  note("number to host");
  return at::_local_scalar_dense(on_host(t));
}

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, optional<at::MemoryFormat>) {
  c10::DeviceGuard guard(self.device());
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  return self;
}

Tensor& set_part(Tensor& result, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  c10::DeviceGuard guard(result.device());
  return at::native::set_storage_cpu_(result, storage, offset, size, stride);
}

Tensor& set_storage(Tensor& result, at::Storage storage) {
  const auto n = static_cast<int64_t>(storage.nbytes() / result.dtype().itemsize());
  return set_part(result, storage, 0, n, {});
}

Tensor& set_tensor(Tensor& result, const Tensor& source) {
  return set_part(result, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& result) {
  c10::DeviceGuard guard(result.device());
  at::Storage storage(c10::Storage::use_byte_size_t(), 0, memory.allocate(0), &memory, true);
  return set_part(result, storage, 0, {0}, {});
}

// ---- operations

struct Together {  // numbers, tensors of the CPU without dimensions, may lie apart
  std::string name;
  optional<at::Device> seen = std::nullopt;
  void operator()(const Tensor& t) {
    if (!t.defined() || (t.is_cpu() && t.dim() == 0)) return;
    if (!seen) seen = t.device();
    TORCH_CHECK(*seen == t.device(), name, ": tensors on ", *seen, " and on ", t.device());
  }
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  Together look{name};
  const bool indexes = name.find("index") != std::string::npos;  // which may be the host's
  for (const auto& v : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (v.isTensor()) look(v.toTensor());
    if (v.isTensorList()) for (const Tensor& t : v.toTensorList().vec()) look(t);
    if (v.isOptionalTensorList() && !indexes)
      for (const optional<Tensor> t : v.toOptionalTensorList()) if (t) look(*t);
  }
  const bool waits = name == "aten::nonzero" || name == "aten::equal" || name == "aten::masked_select" ||
                     name == "aten::_unique2" || name == "aten::unique_dim";
  note(waits ? "numbers to host" : "operations");
  Within one;
  at::native::cpu_fallback(op, stack);
}

Tensor convolution(const Tensor& x, const Tensor& w, const optional<Tensor>& b, at::SymIntArrayRef stride,
                   at::SymIntArrayRef padding, at::SymIntArrayRef dilation, bool transposed, at::SymIntArrayRef more,
                   c10::SymInt groups) {
  Together look{"convolution"};
  const bool biased = b && b->defined();
  look(x), look(w), look(biased ? *b : Tensor());
  note("operations");
  Within one;
  const optional<Tensor> bias = biased ? optional<Tensor>(on_host(*b)) : std::nullopt;
  return on_device(at::convolution_symint(on_host(x), on_host(w), bias, stride, padding, dilation, transposed, more,
                                          groups), x.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, at::SymIntArrayRef stride, at::SymIntArrayRef padding,
    at::SymIntArrayRef dilation, bool transposed, at::SymIntArrayRef more, c10::SymInt groups,
    std::array<bool, 3> mask) {
  note("operations");
  Within one;
  const std::vector<c10::SymInt> sizes{w.sym_size(0)};
  auto [of_x, of_w, of_b] = at::convolution_backward_symint(
      on_host(g), on_host(x), on_host(w), at::OptionalSymIntArrayRef(sizes), stride, padding, dilation, transposed,
      more, groups, mask);
  auto back = [&](const Tensor& t) { return t.defined() ? on_device(t, x.device()) : t; };
  return {back(of_x), back(of_w), back(of_b)};
}

Tensor& conj_physical_out(const Tensor& t, Tensor& out) {
  if (out.sizes() != t.sizes()) out.resize_(t.sizes());
  on_host(out).copy_(on_host(t).conj_physical());
  return out;
}

Tensor histc(const Tensor& t, int64_t bins, const at::Scalar& least, const at::Scalar& most) {  // of integers, too
  note("operations");
  Within one;
  return on_device(at::histc(on_host(t).to(at::kFloat), bins, least, most).to(t.scalar_type()), t.device());
}
}  // namespace

TORCH_LIBRARY(second_device, m) {
  m.def("count(bool on) -> ()", count);
  m.def("counted() -> Dict(str, int)", counted);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("as_strided", as_strided);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("conj_physical.out", conj_physical_out);
  m.impl("histc", histc);
}

TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
