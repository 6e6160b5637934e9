// Kernels of CUDA that compute on the CPU, in the memory of the pretended device.
//
// Each takes the place of the one that torch has for CUDA. It calls the operation with tensors of the CPU that share the memory
// of its arguments, and puts what is new into memory of the device. What is above the kernels stays as it is: autograd, autocast,
// the checks of arguments.
//
// With LIT_LORA_CUDA_COMPUTES=0 operations on large tensors only take the memory of their results, whose values mean nothing: what
// a run of any size allocates can be measured in seconds.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAFunctions.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

using at::Tensor;
using c10::IValue;

namespace {

using Stack = torch::jit::Stack;
using Pairs = std::vector<std::pair<Tensor, Tensor>>;

// They move no values, or copy them by the runtime.
const std::set<std::string> REAL = {
    "aten::empty",      "aten::empty_strided", "aten::as_strided", "aten::view",    "aten::_reshape_alias",
    "aten::resize_",    "aten::set_",          "aten::unfold",     "aten::record_stream", "aten::is_set_to",
    "aten::_pin_memory", "aten::is_pinned",    "aten::_local_scalar_dense", "aten::_fused_sdp_choice",
    "aten::view_as_real", "aten::view_as_complex"};

// For CUDA they are made of others, some of which the CPU does not have.
const std::set<std::string> WHOLE = {"aten::convolution", "aten::convolution_backward", "aten::copy_"};

// They take tensors of two devices.
const std::set<std::string> MIXED = {
    "aten::copy_",         "aten::index",        "aten::index_put", "aten::index_put_",   "aten::_index_put_impl_",
    "aten::_unsafe_index", "aten::_foreach_copy_", "aten::_fused_adam_", "aten::_fused_adamw_"};

const bool COMPUTES = !std::getenv("LIT_LORA_CUDA_COMPUTES") || std::strcmp(std::getenv("LIT_LORA_CUDA_COMPUTES"), "0");
const int64_t LARGE = 1 << 16;  // elements

// Whether the CPU would wait: for what the operation finds, or because a copy has no leave to go on.
bool waits(const std::string& name, const std::vector<IValue>& given) {
  if (name == "aten::nonzero" || name == "aten::equal" || name == "aten::masked_select") return true;
  if (name != "aten::copy_" || given[2].toBool()) return false;
  return given[0].toTensor().is_cuda() != given[1].toTensor().is_cuda();
}

Tensor as_cpu(const Tensor& there) {
  auto options = there.options().device(at::kCPU).requires_grad(false).pinned_memory(false);
  auto* data = there.numel() ? const_cast<void*>(there.const_data_ptr()) : nullptr;
  return at::from_blob(data, there.sizes(), there.strides(), options);
}

// What has its shape and strides, and no values.
Tensor as_meta(const Tensor& one) { return at::empty_strided(one.sizes(), one.strides(), one.options().device(at::kMeta)); }

Tensor as_cuda(const Tensor& here) {
  auto options = here.options().device(at::kCUDA, 0).requires_grad(false).pinned_memory(false);
  Tensor there = at::empty_strided(here.sizes(), here.strides(), options);
  if (here.numel() && !here.is_meta()) as_cpu(there).copy_(here);
  return there;
}

// A result on the device: a view of an argument, or a new tensor.
Tensor placed(const Tensor& result, const Pairs& pairs) {
  if (!result.defined() || result.is_cuda()) return result;
  for (const auto& [there, here] : pairs) {
    if (!result.numel() || here.storage().unsafeGetStorageImpl() != result.storage().unsafeGetStorageImpl()) continue;
    const int64_t offset = there.storage_offset() + result.storage_offset() - here.storage_offset();
    return there.as_strided(result.sizes(), result.strides(), offset);
  }
  return as_cuda(result);
}

// Whether some argument on the device is large.
bool is_large(const std::vector<IValue>& given) {
  auto large = [](const Tensor& one) { return one.defined() && one.is_cuda() && one.numel() > LARGE; };
  for (const IValue& value : given) {
    if (value.isTensor() && large(value.toTensor())) return true;
    if (value.isTensorList())
      for (const Tensor& one : value.toTensorVector())
        if (large(one)) return true;
  }
  return false;
}

void on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto& returns = schema.returns();
  const size_t first = stack->size() - arguments.size();
  const std::vector<IValue> given(stack->begin() + first, stack->end());
  const bool shapes = !COMPUTES && is_large(given);
  const auto device = shapes ? at::kMeta : at::kCPU;
  Pairs pairs, resized;
  bool cuda = false, cpu_asked = false, cpu_tensor = false, cuda_tensor = false;

  auto converted = [&](const Tensor& one, bool written) {
    if (!one.defined() || !one.is_cuda()) {
      cpu_tensor |= one.defined() && one.dim();
      return one.defined() && shapes ? as_meta(one) : one;
    }
    cuda = true;
    cuda_tensor |= one.dim() > 0;
    const bool grows = written && !one.numel();  // an output that gets its size from the operation
    Tensor here = grows ? at::empty({0}, one.options().device(device)) : shapes ? as_meta(one) : as_cpu(one);
    (grows ? resized : pairs).emplace_back(one, here);
    return here;
  };

  for (size_t i = 0; i < arguments.size(); i++) {
    IValue& value = (*stack)[first + i];
    const bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    if (value.isTensor()) {
      value = converted(value.toTensor(), written);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& one : value.toTensorVector()) list.push_back(converted(one, written));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& one : value.toOptionalTensorVector())
        list.push_back(one ? std::optional<Tensor>(converted(*one, written)) : one);
      value = list;
    } else if (value.isDevice()) {
      cuda |= value.toDevice().is_cuda();
      cpu_asked |= !value.toDevice().is_cuda();
      value = c10::Device(device);
    } else if (value.isGenerator() && value.toGenerator().defined() && value.toGenerator().device().is_cuda()) {
      value = at::detail::getDefaultCPUGenerator();
    } else if (arguments[i].name() == "pin_memory" && value.isBool()) {
      value = false;
    }
  }
  TORCH_CHECK(
      !cpu_tensor || !cuda_tensor || MIXED.count(schema.name()),
      "Expected all tensors to be on the same device, but ", schema.name(), " got some on the CPU and some on cuda:0");
  if (cuda && waits(schema.name(), given)) c10::cuda::warn_or_error_on_sync();
  const bool only_written = std::all_of(
      returns.begin(), returns.end(), [](const auto& one) { return one.alias_info() && one.alias_info()->isWrite(); });
  if (shapes && only_written && resized.empty()) {
    stack->resize(first);
    for (size_t j = 0; j < returns.size(); j++) stack->emplace_back();
  } else {
    op.callBoxed(stack);
  }

  for (const auto& [there, here] : resized) {
    there.resize_(here.sizes());
    if (!shapes) as_cpu(there).copy_(here);
  }
  for (size_t j = 0; j < returns.size(); j++) {
    IValue& value = (*stack)[stack->size() - returns.size() + j];
    const auto* alias = returns[j].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t i = 0; i < arguments.size(); i++) {
        const auto* of = arguments[i].alias_info();
        if (of && of->isWrite() && of->beforeSets() == alias->beforeSets()) value = given[i];
      }
    } else if (cuda && !cpu_asked && value.isTensor()) {
      value = placed(value.toTensor(), pairs);
    } else if (cuda && !cpu_asked && value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& one : value.toTensorVector()) list.push_back(placed(one, pairs));
      value = list;
    }
  }
}

// Replaces the kernels that operations of a namespace have for CUDA.
void replace(const std::string& space) {
  static std::vector<torch::Library*> kept;
  kept.push_back(new torch::Library(torch::Library::IMPL, space, c10::DispatchKey::CUDA, __FILE__, __LINE__));
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findOp(name);
    if (!op || !op->hasSchema() || name.getNamespace() != space || REAL.count(name.name)) continue;
    if (!WHOLE.count(name.name) && !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    kept.back()->impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
  }
}

}  // namespace

TORCH_LIBRARY(pretended_cuda, library) {
  library.def("replace(str space) -> ()", replace);
  library.def("as_cpu(Tensor there) -> Tensor", as_cpu);
  library.def("as_cuda(Tensor here) -> Tensor", as_cuda);
}
