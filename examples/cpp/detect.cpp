// Copyright (C) yolo_ext authors. AGPL-3.0 licence.
// Detect objects with ONNX Runtime alone; for detect models with fixed size, without embedded NMS. The picture is a
// binary PPM (convert shot.jpg shot.ppm). Prints class index, score, and the corners x1 y1 x2 y2 in its pixels.
//   g++ -O2 -std=c++17 detect.cpp -I$ORT/include -L$ORT/lib -lonnxruntime -o detect && ./detect int8.onnx shot.ppm
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture { int w = 0, h = 0; std::vector<unsigned char> rgb; };
struct Box { int cls; float score, x1, y1, x2, y2; };

Picture read_ppm(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int most = 0;
  Picture p;
  file >> magic >> p.w >> p.h >> most;
  if (magic != "P6" || most != 255) throw std::runtime_error("not a binary PPM of 8 bits");
  file.get();
  p.rgb.resize(size_t(3) * p.w * p.h);
  file.read(reinterpret_cast<char*>(p.rgb.data()), std::streamsize(p.rgb.size()));
  return p;
}

// Scale the picture to w x h in a grey frame, bilinear, as planes of 0 to 1.
std::vector<float> letterbox(const Picture& p, int width, int height, int left, int top, int w, int h) {
  std::vector<float> planes(size_t(3) * width * height, 114 / 255.f);
  for (int y = 0; y < h; ++y)
    for (int x = 0; x < w; ++x) {
      float sx = std::clamp((x + .5f) * p.w / w - .5f, 0.f, p.w - 1.f);
      float sy = std::clamp((y + .5f) * p.h / h - .5f, 0.f, p.h - 1.f);
      int x0 = int(sx), y0 = int(sy), x1 = std::min(x0 + 1, p.w - 1), y1 = std::min(y0 + 1, p.h - 1);
      for (int c = 0; c < 3; ++c) {
        auto at = [&](int px, int py) { return float(p.rgb[(size_t(py) * p.w + px) * 3 + c]); };
        float above = at(x0, y0) + (sx - x0) * (at(x1, y0) - at(x0, y0));
        float below = at(x0, y1) + (sx - x0) * (at(x1, y1) - at(x0, y1));
        auto& value = planes[(size_t(c) * height + top + y) * width + left + x];
        value = std::round(above + (sy - y0) * (below - above)) / 255;
      }
    }
  return planes;
}

float overlap(const Box& a, const Box& b) {
  float w = std::min(a.x2, b.x2) - std::max(a.x1, b.x1), h = std::min(a.y2, b.y2) - std::max(a.y1, b.y1);
  float both = std::max(w, 0.f) * std::max(h, 0.f);
  return both / ((a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - both);
}

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "detect model.onnx picture.ppm [confidence]\n"), 2;
  const float least = argc > 3 ? std::stof(argv[3]) : .25f;
  Ort::Env env;
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  Ort::AllocatorWithDefaultOptions allocator;
  auto input = session.GetInputNameAllocated(0, allocator), output = session.GetOutputNameAllocated(0, allocator);
  auto type = session.GetInputTypeInfo(0);
  std::vector<int64_t> shape = type.GetTensorTypeAndShapeInfo().GetShape();  // 1, 3, height, width
  const int height = int(shape[2]), width = int(shape[3]);

  Picture p = read_ppm(argv[2]);
  const float gain = std::min(float(width) / p.w, float(height) / p.h);
  const int w = int(std::round(p.w * gain)), h = int(std::round(p.h * gain));
  const int left = int(std::round((width - w) / 2.f - .1f)), top = int(std::round((height - h) / 2.f - .1f));
  std::vector<float> planes = letterbox(p, width, height, left, top, w, h);

  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto tensor = Ort::Value::CreateTensor<float>(memory, planes.data(), planes.size(), shape.data(), shape.size());
  const char *in[] = {input.get()}, *out[] = {output.get()};
  auto found = session.Run(Ort::RunOptions{}, in, &tensor, 1, out, 1);
  auto size = found[0].GetTensorTypeAndShapeInfo().GetShape();  // 1, 4 + classes, anchors
  const float* rows = found[0].GetTensorData<float>();
  const int anchors = int(size[2]), classes = int(size[1]) - 4;

  std::vector<Box> boxes;
  for (int i = 0; i < anchors; ++i) {
    auto at = [&](int row) { return rows[size_t(row) * anchors + i]; };
    int best = 0;
    for (int c = 1; c < classes; ++c) if (at(4 + c) > at(4 + best)) best = c;
    if (at(4 + best) <= least) continue;
    float x = (at(0) - left) / gain, y = (at(1) - top) / gain, dx = at(2) / 2 / gain, dy = at(3) / 2 / gain;
    boxes.push_back({best, at(4 + best), x - dx, y - dy, x + dx, y + dy});
  }
  std::sort(boxes.begin(), boxes.end(), [](const Box& a, const Box& b) { return a.score > b.score; });
  std::vector<Box> kept;
  for (const Box& b : boxes) {
    auto same = [&](const Box& k) { return k.cls == b.cls && overlap(k, b) > .7f; };
    if (std::any_of(kept.begin(), kept.end(), same)) continue;
    kept.push_back(b);
    std::printf("%d %.3f %.1f %.1f %.1f %.1f\n", b.cls, b.score, b.x1, b.y1, b.x2, b.y2);
  }
}
