// The few entries of ONNX Runtime's C interface that a custom operator needs, so that building takes a compiler and
// nothing else. The interface is a table of functions to which versions only append; the positions and the layout of
// OrtCustomOp are those of onnxruntime_c_api.h (API version 17, ONNX Runtime 1.17 and later).
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;
constexpr int kFloat = 1, kUint8 = 2, kFloat16 = 10;  // ONNXTensorElementDataType
constexpr int kFail = 1, kInvalidArgument = 2;        // OrtErrorCode
constexpr int kRequired = 0, kOptional = 1;           // OrtCustomOpInputOutputCharacteristic

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct Shape;  // OrtTensorTypeAndShapeInfo
struct CustomOp;

struct Api {
  void* const table[400];

  template <class Function>
  Function at(int index) const {
    return reinterpret_cast<Function>(table[index]);
  }
  Status* create_status(int code, const char* message) const {
    return at<Status* (*)(int, const char*)>(0)(code, message);
  }
  Status* create_domain(const char* name, CustomOpDomain** out) const {
    return at<Status* (*)(const char*, CustomOpDomain**)>(26)(name, out);
  }
  Status* add_op(CustomOpDomain* domain, const CustomOp* op) const {
    return at<Status* (*)(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return at<Status* (*)(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }
  Status* data(Value* value, void** out) const { return at<Status* (*)(Value*, void**)>(51)(value, out); }
  Status* rank(const Shape* shape, size_t* out) const {
    return at<Status* (*)(const Shape*, size_t*)>(61)(shape, out);
  }
  Status* dimensions(const Shape* shape, int64_t* out, size_t count) const {
    return at<Status* (*)(const Shape*, int64_t*, size_t)>(62)(shape, out, count);
  }
  Status* shape(const Value* value, Shape** out) const {
    return at<Status* (*)(const Value*, Shape**)>(65)(value, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, float* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
    return at<Status* (*)(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* input_count(const KernelContext* context, size_t* out) const {
    return at<Status* (*)(const KernelContext*, size_t*)>(88)(context, out);
  }
  Status* input(const KernelContext* context, size_t index, const Value** out) const {
    return at<Status* (*)(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* dims, size_t count, Value** out) const {
    return at<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, dims, count,
                                                                                       out);
  }
  void release(Status* status) const { at<void (*)(Status*)>(93)(status); }
  void release(Shape* shape) const { at<void (*)(Shape*)>(99)(shape); }
  Status* parallel_for(const KernelContext* context, void (*body)(void*, size_t), size_t total, size_t batches,
                       void* data) const {
    return at<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, body, total, batches, data);
  }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*version)();
};

struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy_kernel)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory_type)(const CustomOp*, size_t);
  int (*variadic_input_min)(const CustomOp*);
  int (*variadic_input_same)(const CustomOp*);
  int (*variadic_output_min)(const CustomOp*);
  int (*variadic_output_same)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  void* later[4];
};

}  // namespace ort
