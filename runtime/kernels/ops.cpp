// The kernels as operators of ONNX Runtime (domain "quantvla"), their loops on its threads, and a plain C entry for tests.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "linear.h"
#include "ort_api.h"

#if defined(_WIN32)
#define QUANTVLA_EXPORT extern "C" __declspec(dllexport)
#else
#define QUANTVLA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace quantvla {
namespace {

constexpr size_t kTaskBytes = 256 * 1024;  // of weights in one task: a part of the second-level cache
constexpr int kTaskRows = 208;             // 16 tiles of 13
constexpr size_t kSerial = 1 << 16;        // values worth one thread's time only

// Memory that a thread keeps between calls; page faults would cost more than the copy.
class Scratch {
 public:
  template <class T>
  T* take(size_t count) {
    const size_t begin = (used_ + 63) / 64 * 64;
    used_ = begin + count * sizeof(T);
    return reinterpret_cast<T*>(begin);  // an offset until `place` knows the buffer
  }
  void reset() { used_ = 0; }
  void place() {
    if (buffer_.size() < used_ + 64) buffer_.resize(used_ + 64);
    base_ = (reinterpret_cast<uintptr_t>(buffer_.data()) + 63) / 64 * 64;
  }
  template <class T>
  T* at(T* offset) const {
    return reinterpret_cast<T*>(base_ + reinterpret_cast<uintptr_t>(offset));
  }

 private:
  std::vector<uint8_t> buffer_;
  size_t used_ = 0;
  uintptr_t base_ = 0;
};

Scratch& scratch() {
  thread_local Scratch mine;
  mine.reset();
  return mine;
}

Codes room_for_codes(const Linear& linear) {
  Scratch& s = scratch();
  const size_t rows = linear.rows, blocks = linear.weights.blocks();
  auto* codes = s.take<int8_t>(rows * linear.weights.in);
  auto* scales = s.take<float>(rows * blocks);
  auto* sums = s.take<int32_t>(rows * blocks);
  s.place();
  return {s.at(codes), s.at(scales), s.at(sums)};
}

// Run a linear layer; `parallel(count, body)` calls body(i) for all i < count, on whatever threads.
template <class Parallel>
void run(const Linear& linear, const Kernels& kernels, const Parallel& parallel) {
  const Codes codes = room_for_codes(linear);
  const Weights& w = linear.weights;
  const int rows = linear.rows, panels = w.out / kPanel;
  const int chunks = static_cast<size_t>(rows) * w.in < kSerial ? 1 : std::min(rows, 16);
  const auto quantize = [&](size_t i) {
    kernels.quantize(linear, codes, static_cast<int>(rows * i / chunks), static_cast<int>(rows * (i + 1) / chunks));
  };
  if (chunks == 1) {
    quantize(0);
  } else {
    parallel(chunks, quantize);
  }
  int step = std::max<int>(2, static_cast<int>(kTaskBytes / w.panel_bytes()) & ~1);
  int columns = (panels + step - 1) / step;
  const int row_parts = std::max(1, (rows + kTaskRows / 2) / kTaskRows);
  if (columns * row_parts < 8) columns = std::min(8 / row_parts + 1, std::max(1, panels / 4));
  step = ((panels + columns - 1) / columns + 1) & ~1;
  columns = (panels + step - 1) / step;
  parallel(static_cast<size_t>(columns) * row_parts, [&](size_t i) {
    const int column = static_cast<int>(i) / row_parts, part = static_cast<int>(i) % row_parts;
    kernels.multiply(linear, codes, static_cast<int>(static_cast<int64_t>(rows) * part / row_parts),
                     static_cast<int>(static_cast<int64_t>(rows) * (part + 1) / row_parts), column * step,
                     std::min(panels, (column + 1) * step));
  });
}

template <class Parallel>
void run(const Attention& t, const AttentionKernels& kernels, const Parallel& parallel) {
  Scratch& s = scratch();
  const int heads = t.batch * t.heads;
  const size_t size = t.packed_size() * kernels.number_bytes;
  auto* offset = s.take<uint8_t>(size * heads);
  s.place();
  uint8_t* packed = s.at(offset);
  parallel(heads, [&](size_t i) { kernels.pack(t, static_cast<int>(i), packed + i * size); });
  const int parts = (t.queries + kQueryBlock - 1) / kQueryBlock;
  parallel(static_cast<size_t>(heads) * parts, [&](size_t i) {
    const int head = static_cast<int>(i) / parts, begin = static_cast<int>(i) % parts * kQueryBlock;
    kernels.attend(t, head, packed + head * size, begin, std::min(t.queries, begin + kQueryBlock));
  });
}

// ONNX Runtime's side.

const ort::Api* api = nullptr;

void check(ort::Status* status) {
  if (status == nullptr) return;
  api->release(status);
  throw std::runtime_error("a call of ONNX Runtime failed");
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

class Context {
 public:
  explicit Context(ort::KernelContext* context) : context_(context) { check(api->input_count(context, &inputs_)); }

  const ort::Value* input(size_t index) const {
    const ort::Value* value = nullptr;
    if (index < inputs_) check(api->input(context_, index, &value));
    return value;
  }
  template <class T>
  const T* data(size_t index) const {
    const ort::Value* value = input(index);
    return value == nullptr ? nullptr : static_cast<const T*>(content(const_cast<ort::Value*>(value)));
  }
  std::vector<int64_t> shape(size_t index) const {
    ort::Shape* shape = nullptr;
    check(api->shape(input(index), &shape));
    size_t rank = 0;
    ort::Status* status = api->rank(shape, &rank);
    std::vector<int64_t> sizes(rank);
    if (status == nullptr) status = api->dimensions(shape, sizes.data(), rank);
    api->release(shape);
    check(status);
    return sizes;
  }
  float* output(const std::vector<int64_t>& shape) const {
    ort::Value* value = nullptr;
    check(api->output(context_, 0, shape.data(), shape.size(), &value));
    return static_cast<float*>(content(value));
  }
  template <class Body>
  void parallel(size_t count, const Body& body) const {
    if (count == 1) return body(0);
    check(api->parallel_for(
        context_, [](void* data, size_t i) { (*static_cast<const Body*>(data))(i); }, count, count,
        const_cast<Body*>(&body)));
  }

 private:
  static void* content(ort::Value* value) {
    void* data = nullptr;
    check(api->data(value, &data));
    return data;
  }
  ort::KernelContext* context_;
  size_t inputs_ = 0;
};

int64_t integer(const ort::KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(api->attribute(info, name, &value));
  return value;
}

int64_t product(const std::vector<int64_t>& sizes, size_t count) {
  int64_t total = 1;
  for (size_t i = 0; i < count; ++i) total *= sizes[i];
  return total;
}

// IntegerLinear(x, codes, scales, bias?, other?) -> y; attributes bits, block, activation, combine.
class IntegerLinear {
 public:
  static constexpr const char* kName = "IntegerLinear";
  static constexpr size_t kInputs = 5, kRequiredInputs = 3;
  static int input_type(size_t i) { return i == 1 ? ort::kUint8 : i == 2 ? ort::kFloat16 : ort::kFloat; }

  explicit IntegerLinear(const ort::KernelInfo* info)
      : bits_(static_cast<int>(integer(info, "bits"))),
        block_(static_cast<int>(integer(info, "block"))),
        activation_(static_cast<Activation>(integer(info, "activation"))),
        combine_(static_cast<Combine>(integer(info, "combine"))) {
    require(bits_ == 4 || bits_ == 8, "IntegerLinear: bits must be 4 or 8");
    require(block_ > 0 && block_ % 8 == 0, "IntegerLinear: block must be a multiple of 8");
  }

  void compute(const Context& context) const {
    auto shape = context.shape(0);
    const auto stored = context.shape(1);
    require(!shape.empty() && stored.size() == 2, "IntegerLinear: wrong number of dimensions");
    const int64_t in = shape.back(), rows = product(shape, shape.size() - 1), out = stored[0] * kPanel;
    require(in % block_ == 0 && stored[1] == in * bits_ / 8 * kPanel, "IntegerLinear: weight does not fit the input");
    require(product(context.shape(2), context.shape(2).size()) == out * (in / block_),
            "IntegerLinear: scales do not fit the weight");
    shape.back() = out;
    const bool has_bias = context.input(3) != nullptr, has_other = context.input(4) != nullptr;
    require(!has_bias || product(context.shape(3), context.shape(3).size()) == out, "IntegerLinear: bias does not fit");
    require(has_other == (combine_ != Combine::kNone) && (!has_other || context.shape(4) == shape),
            "IntegerLinear: the tensor to combine with does not fit");
    if (rows == 0) {
      context.output(shape);
      return;
    }
    Linear linear{context.data<float>(0),
                  static_cast<int>(rows),
                  {context.data<uint8_t>(1), context.data<uint16_t>(2), bits_, static_cast<int>(in),
                   static_cast<int>(out), block_},
                  context.data<float>(3),
                  context.data<float>(4),
                  activation_,
                  combine_,
                  context.output(shape)};
    run(linear, kernels_of_this_processor(),
        [&](size_t count, const auto& body) { context.parallel(count, body); });
  }

 private:
  int bits_, block_;
  Activation activation_;
  Combine combine_;
};

// Whether attention multiplies float32 numbers, in all sessions of the process, although the processor has faster products.
std::atomic<bool> attention_in_float{false};

// Attention(q, k, v, bias?) -> out; attributes num_heads, scale. Shapes as com.microsoft.MultiHeadAttention.
class AttentionOp {
 public:
  static constexpr const char* kName = "Attention";
  static constexpr size_t kInputs = 4, kRequiredInputs = 3;
  static int input_type(size_t) { return ort::kFloat; }

  explicit AttentionOp(const ort::KernelInfo* info) : heads_(integer(info, "num_heads")) {
    check(api->attribute(info, "scale", &scale_));
  }

  void compute(const Context& context) const {
    const auto q = context.shape(0), k = context.shape(1);
    require(q.size() == 3 && k.size() == 3 && context.shape(2) == k && q[0] == k[0] && q[2] == k[2],
            "Attention: shapes do not fit");
    require(q[2] % (heads_ * 32) == 0, "Attention: a head must be a multiple of 32 wide");
    Attention t{context.data<float>(0), context.data<float>(1), context.data<float>(2), context.data<float>(3),
                context.output(q), static_cast<int>(q[0]), static_cast<int>(heads_), static_cast<int>(q[1]),
                static_cast<int>(k[1]), static_cast<int>(q[2] / heads_), 0, 0, scale_};
    if (t.bias != nullptr) {
      const auto bias = context.shape(3);
      require(bias.size() == 4 && (bias[0] == 1 || bias[0] == q[0]) && (bias[1] == 1 || bias[1] == heads_) &&
                  bias[2] == q[1] && bias[3] == k[1],
              "Attention: the bias does not fit");
      const size_t plane = static_cast<size_t>(q[1]) * k[1];
      t.bias_head = bias[1] == 1 ? 0 : plane;
      t.bias_batch = bias[0] == 1 ? 0 : plane * bias[1];
    }
    run(t, attention_of_this_processor(attention_in_float), [&](size_t count, const auto& body) { context.parallel(count, body); });
  }

 private:
  int64_t heads_;
  float scale_ = 0;
};

template <class Op>
ort::Status* guarded(const Op& body) {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return api->create_status(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return api->create_status(ort::kFail, error.what());
  }
}

template <class Op>
const ort::CustomOp* definition() {
  static const ort::CustomOp op = [] {
    ort::CustomOp d{};
    d.version = ort::kApiVersion;
    d.name = [](const ort::CustomOp*) { return Op::kName; };
    d.execution_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
    d.input_type = [](const ort::CustomOp*, size_t i) { return Op::input_type(i); };
    d.input_count = [](const ort::CustomOp*) { return Op::kInputs; };
    d.output_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
    d.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
    d.input_characteristic = [](const ort::CustomOp*, size_t i) {
      return i < Op::kRequiredInputs ? ort::kRequired : ort::kOptional;
    };
    d.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
    d.input_memory_type = [](const ort::CustomOp*, size_t) { return 0; };
    d.variadic_input_min = d.variadic_output_min = [](const ort::CustomOp*) { return 1; };
    d.variadic_input_same = d.variadic_output_same = [](const ort::CustomOp*) { return 1; };
    d.start_version = [](const ort::CustomOp*) { return 1; };
    d.end_version = [](const ort::CustomOp*) { return 1000; };
    d.create_kernel_v2 = [](const ort::CustomOp*, const ort::Api*, const ort::KernelInfo* info, void** kernel) {
      return guarded([&] { *kernel = new Op(info); });
    };
    d.compute_v2 = [](void* kernel, ort::KernelContext* context) {
      return guarded([&] { static_cast<const Op*>(kernel)->compute(Context(context)); });
    };
    d.destroy_kernel = [](void* kernel) { delete static_cast<Op*>(kernel); };
    return d;
  }();
  return &op;
}

}  // namespace
}  // namespace quantvla

// What ONNX Runtime calls when the library is given to session options.
QUANTVLA_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  using namespace quantvla;
  api = base->get_api(ort::kApiVersion);
  if (api == nullptr) return nullptr;  // older than 1.17: the graphs' own definitions of the operators are used
  static ort::CustomOpDomain* const domain = [] {
    ort::CustomOpDomain* made = nullptr;
    ort::Status* status = api->create_domain("quantvla", &made);
    if (status == nullptr) status = api->add_op(made, definition<IntegerLinear>());
    if (status == nullptr) status = api->add_op(made, definition<AttentionOp>());
    if (status == nullptr) return made;
    api->release(status);
    return static_cast<ort::CustomOpDomain*>(nullptr);
  }();
  if (domain == nullptr) return api->create_status(ort::kFail, "quantvla: the operators could not be defined");
  return api->add_domain(options, domain);
}

// The names of the kernels in use here.
QUANTVLA_EXPORT const char* quantvla_kernels() { return quantvla::kernels_of_this_processor().name; }
// A hash of the sources.
QUANTVLA_EXPORT const char* quantvla_version() { return QUANTVLA_VERSION; }
QUANTVLA_EXPORT const char* quantvla_attention() {
  return quantvla::attention_of_this_processor(quantvla::attention_in_float).name;
}
QUANTVLA_EXPORT void quantvla_attention_in_float(int on) { quantvla::attention_in_float = on != 0; }

// One linear layer on one thread with the kernels called `name`; 0, or -1 if this processor lacks them.
QUANTVLA_EXPORT int quantvla_linear(const char* name, const float* x, int rows, const uint8_t* codes,
                                    const uint16_t* scales, int bits, int in, int out, int block, const float* bias,
                                    const float* other, int activation, int combine, float* y) {
  using namespace quantvla;
  const Kernels* kernels = kernels_by_name(name);
  if (kernels == nullptr) return -1;
  const Linear linear{x, rows, {codes, scales, bits, in, out, block}, bias, other,
                      static_cast<Activation>(activation), static_cast<Combine>(combine), y};
  run(linear, *kernels, [](size_t count, const auto& body) {
    for (size_t i = 0; i < count; ++i) body(i);
  });
  return 0;
}

// Attention on one thread with the kernels called `name`; 0, or -1 if this processor lacks them.
QUANTVLA_EXPORT int quantvla_attend(const char* name, const float* q, const float* k, const float* v, const float* bias, int batch,
                                    int heads, int queries, int keys, int dim, float scale, float* out) {
  using namespace quantvla;
  const AttentionKernels* kernels = attention_by_name(name);
  if (kernels == nullptr) return -1;
  const Attention t{q, k, v, bias, out, batch, heads, queries, keys, dim, 0, 0, scale};
  run(t, *kernels, [](size_t count, const auto& body) {
    for (size_t i = 0; i < count; ++i) body(i);
  });
  return 0;
}
