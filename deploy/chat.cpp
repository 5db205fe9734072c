// The bot without Python: answers the lines of standard input with the search, weights and words of scripted.pt, as
// `python -m helpers chat --decoder greedy` does.
//
//   cmake -S deploy -B build -DCMAKE_PREFIX_PATH="$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
//   cmake --build build
//   echo "Hello, who are you?" | build/chat runs/sample/scripted.pt
//
// With a second file, steps.pt2, the decoder's steps are AOTInductor's and the loop is here; TorchScript encodes.
// With --times at the end, standard error tells the milliseconds of each reply, and those of its search alone.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <chrono>

#include "text.h"

using torch::Tensor;
using Clock = std::chrono::steady_clock;
enum { PAD, SOS, EOS, UNK };

double since(Clock::time_point began) { return std::chrono::duration<double, std::milli>(Clock::now() - began).count(); }

struct Bot {
  torch::jit::ExtraFilesMap extra{{"vocabulary.json", ""}, {"settings.json", ""}, {"examples.json", ""}};
  torch::jit::Module search, model;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> steps;
  UnicodeString word = WORD;  // the regular expression of one
  Words words{u"<pad>", u"<sos>", u"<eos>", u"<unk>"}, examples, marks, last;
  std::map<UnicodeString, int64_t> ids;
  std::map<UnicodeString, UnicodeString> spelling;
  int64_t longest_query, longest_reply, context;
  double decline_below, searched = 0;  // milliseconds of the searches of a reply

  explicit Bot(const std::string& path) : search(torch::jit::load(path, torch::kCPU, extra)) {
    model = search.attr("model").toModule();
    const auto vocabulary = UnicodeString::fromUTF8(extra["vocabulary.json"]);
    for (const auto& known : strings(vocabulary, place(vocabulary, u"words"))) words.push_back(known);
    for (const auto& known : words) ids.emplace(known, ids.size());
    const Words spelt = strings(vocabulary, place(vocabulary, u"spelling"));
    for (size_t at = 0; at + 1 < spelt.size(); at += 2) spelling[spelt[at]] = spelt[at + 1];
    const UnicodeString all = strings(vocabulary, place(vocabulary, u"marks")).at(0);
    for (int32_t at = 0; at < all.length(); at = all.moveIndex32(at, 1)) {
      word += u"|\\" + UnicodeString(all.char32At(at));
      if (ids.count(all.char32At(at))) marks.push_back(all.char32At(at));
    }
    examples = strings(UnicodeString::fromUTF8(extra["examples.json"]), 0);
    const auto settings = UnicodeString::fromUTF8(extra["settings.json"]);
    const auto number = [&](const UnicodeString& name) {
      std::string text;
      return std::stod(settings.tempSubString(place(settings, name)).toUTF8String(text));
    };
    longest_query = number(u"max_query_words"), longest_reply = number(u"max_response_words") + 1;
    context = number(u"context_words"), decline_below = number(u"decline_below");
  }

  Tensor ids_of(const Words& query) const {
    std::vector<int64_t> found;
    for (const auto& said : query) found.push_back(ids.count(said) ? ids.at(said) : UNK);
    return torch::tensor(found).unsqueeze(0);
  }

  Tensor in_steps(Tensor query, const Tensor& lengths) {
    // The loop around AOTInductor's package, which takes a query of fixed length and gives the ids of one or more steps.
    const int64_t fixed = longest_query + (context ? context + 1 : 0);
    query = torch::constant_pad_nd(query, {0, fixed - query.size(1)}, PAD);
    const auto encoded = model.get_method("encode")({query, lengths}).toTuple();
    const auto memory = encoded->elements()[0].toTuple(), state = encoded->elements()[1].toTuple();
    std::vector<Tensor> now{torch::full({1}, SOS, torch::kLong), torch::zeros({1}, torch::kBool)}, spoken;
    for (const auto& part : state->elements()) now.push_back(part.toTensor());
    for (int64_t said = 0; said < longest_reply; said += spoken.back().size(1)) {
      for (const auto& part : memory->elements()) now.push_back(part.toTensor());
      auto after = steps->run(now);
      spoken.push_back(after[0]);
      now.assign(after.begin() + 1, after.end());
      if (now[1].item<bool>()) break;
    }
    return torch::cat(spoken, 1).slice(1, 0, longest_reply);
  }

  Words said(const Words& words_asked) {
    // The greedy reply; no words where it is less probable than the setting decline_below.
    const Tensor query = ids_of(words_asked), lengths = torch::tensor({query.size(1)});
    const auto began = Clock::now();
    const Tensor reply = steps ? in_steps(query, lengths) : search.forward({query, lengths, longest_reply}).toTensor();
    searched += since(began);
    if (decline_below > 0) {
      const Tensor inputs = torch::constant_pad_nd(reply.slice(1, 0, -1), {1, 0}, SOS);
      const Tensor logs = model.forward({query, lengths, inputs}).toTensor().log_softmax(2);
      const Tensor each = logs.gather(2, reply.unsqueeze(2)).squeeze(2).masked_fill(reply == PAD, 0);
      if (each.sum().exp().item<double>() < decline_below) return {};
    }
    Words found;
    for (const auto id : std::vector<int64_t>(reply.data_ptr<int64_t>(), reply.data_ptr<int64_t>() + reply.size(1))) {
      if (id == EOS) break;
      found.push_back(words.at(id));
    }
    return found;
  }

  UnicodeString answer(UnicodeString line) {
    const Words before = std::exchange(last, {});
    line.remove(0, line.moveIndex32(line.length(), -10000));
    Words query = tokenise(line, word);
    if (query.empty()) {
      return line.trim().isEmpty() ? u"Say something, and I will answer." : u"I see no word in that. Try a sentence?";
    }
    query.erase(query.begin(), query.end() - std::min<int64_t>(query.size(), longest_query));
    if (context && !before.empty()) {
      query.insert(query.begin(), words[EOS]);
      query.insert(query.begin(), before.end() - std::min<int64_t>(before.size(), context), before.end());
    }
    std::vector<Words> readings{query};  // a mark more or less at the end makes no other question
    if (std::count(marks.begin(), marks.end(), query.back())) query.pop_back();
    if (decline_below > 0 && !query.empty()) {
      readings.push_back(query);
      for (const auto& mark : marks) (readings.push_back(query), readings.back().push_back(mark));
    }
    for (const auto& reading : readings) {
      if (!(last = said(reading)).empty()) break;
    }
    if (!last.empty()) {
      UnicodeString text;
      for (const auto& one : last) text += (text.isEmpty() ? u"" : u" ") + (spelling.count(one) ? spelling[one] : one);
      return spell(text);
    }
    if (decline_below == 0) return u"I have no words for that.";
    UnicodeString text = u"I don't know that; I can answer, for example:";
    for (size_t at = 0; at < std::min<size_t>(examples.size(), 3); at++) text += u" “" + examples[at] + u"”";
    return text;
  }
};

int main(int count, char** arguments) try {
  const bool timed = count > 1 && std::string(arguments[count - 1]) == "--times";
  count -= timed;
  if (count < 2) throw std::runtime_error("give a scripted.pt, and a steps.pt2 if AOTInductor is to do the steps");
  torch::NoGradGuard no_gradients;
  Bot bot(arguments[1]);
  if (count > 2) bot.steps = std::make_unique<torch::inductor::AOTIModelPackageLoader>(arguments[2]);
  for (std::string line, reply; std::getline(std::cin, line); reply.clear()) {
    const auto began = Clock::now();
    bot.searched = 0;
    bot.answer(UnicodeString::fromUTF8(line)).toUTF8String(reply);
    if (timed) std::cerr << since(began) << " " << bot.searched << std::endl;
    std::cout << reply << std::endl;
  }
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
