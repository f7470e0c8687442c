// An onnxruntime session of couplet's own, over a graph whose attention is couplet.Attention.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "library.h"
#include "operator.h"

namespace couplet::onnxruntime {

struct Feed {  // borrowed for the length of a run
  std::string name;
  ElementType type = ElementType::undefined;
  std::vector<int64_t> dims;
  void* data = nullptr;
  size_t bytes = 0;
};

struct Output {  // valid as long as it exists, whatever happens to its session
  OwnedValue value;
  ElementType type = ElementType::undefined;
  std::vector<int64_t> dims;
  void* data = nullptr;  // of value or of own
  std::vector<float> own;

  int64_t elements() const;
  size_t bytes() const;
  // Makes logits [rows][columns][vocabulary] float32, and with last_column [rows][1][vocabulary].
  couplet_status to_logits(bool last_column, couplet_report* report);
};

// Safe to use from any thread; runs may overlap.
class Session {
 public:
  struct Options {
    std::string folder;   // where the model's external data lies; empty: it has none
    int32_t threads = 1;  // of the library's own operators
    bool cuda =
        false;  // nodes that the CUDA execution provider knows run there, the others and couplet.Attention on the CPU
    int32_t cuda_device = 0;
  };
  // model: an encoded ModelProto, not used after the call.
  static couplet_status create(const Library& library, std::span<const uint8_t> model, const Options& options,
                               std::shared_ptr<Session>* out, couplet_report* report);
  // What create() would say about `options.cuda` alone: COUPLET_ONNXRUNTIME with the library's reason where it cannot be had.
  static couplet_status check_cuda(const Library& library, const Options& options, couplet_report* report);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Feeds every input of the graph but "couplet.run", which a graph has that runs in a step. outputs: one for each name wanted.
  couplet_status run(std::span<const Feed> feeds, std::span<const std::string> wanted, Run* run,
                     std::vector<Output>* outputs, couplet_report* report);
  // Ends the runs whose Run::cancel is `cancel` at their next node.
  void interrupt(const volatile int32_t* cancel);

 private:
  explicit Session(const Library& library);
  couplet_status feed(const Feed& feed, OwnedValue* out, couplet_report* report) const;
  couplet_status describe(Output* output, couplet_report* report) const;

  const Library& library_;
  Runs runs_;
  AttentionOperator operator_;
  OwnedOperatorDomain domain_;
  OwnedSession session_;  // the first to go: its kernels use what stands above
};

}  // namespace couplet::onnxruntime
