// A step's layers in one call: what Python does between two operators takes longer than some of them.

class Stack {
  public:
    Stack(const StackCall &call, const Level &level, void (*gemm)(const GemmCall &))
        : call_(call), level_(level), gemm_(gemm) {}

    void run() const {
        for (long long i = 0; i < call_.count; ++i) {
            const Layer &layer = call_.layers[i];
            norm(layer.input_norm, layer.input_eps, i ? call_.added : nullptr);
            attend(layer);
            norm(layer.post_norm, layer.post_eps, call_.added);
            linear(call_.gate_up, call_.normed, layer.gate_up);
            level_.gate({BFLOAT16, call_.gated, call_.gate_up, call_.rows, layer.down.inputs});
            linear(call_.added, call_.gated, layer.down);
        }
    }

  private:
    void norm(const void *weight, double eps, const void *added) const {
        level_.norm({BFLOAT16, call_.normed, call_.residual, added, weight, call_.rows, call_.hidden, eps});
    }

    void attend(const Layer &layer) const {
        linear(call_.qkv, call_.normed, layer.qkv);
        level_.rope({BFLOAT16, call_.q, layer.keys, layer.values, call_.qkv, layer.qkv.outputs, call_.cos, call_.sin,
                     call_.slots, call_.rows, call_.heads, call_.kv_heads, call_.dim});
        level_.attention({BFLOAT16, call_.attended, call_.q, layer.keys, layer.values, call_.tables, call_.table_stride,
                          call_.lengths, call_.rows, call_.heads, call_.kv_heads, call_.dim, call_.block_size, layer.scale,
                          layer.softcap, layer.window});
        linear(call_.added, call_.attended, layer.o);
    }

    void linear(void *y, const void *x, const Linear &linear) const {
        gemm_({y, x, linear.weight, linear.bias, linear.inputs, call_.rows, linear.inputs, linear.outputs});
        if (call_.tasks && linear.adapters) {
            level_.lora({BFLOAT16, y, linear.outputs, linear.outputs, x, linear.inputs, linear.inputs, call_.lora_hidden,
                         call_.tasks, {linear.adapters, call_.slot_stride, 1}});
        }
    }

    const StackCall &call_;
    const Level &level_;
    void (*gemm_)(const GemmCall &);
};
